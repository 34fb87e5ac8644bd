"""Products in 16 bits feel updates that are smaller than the spacing of the weights: right on average, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from halfrank.data.pairs import Pair
from halfrank.model import folder, storage
from halfrank.model.storage import Residuals
from halfrank.numerics.rounding import join
from halfrank.precision import compute_named
from halfrank.train.config import TrainConfig
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from tiny import PAIRS, make_folder

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COMPUTES = [*FORMATS, *(f"emulated-{name}" for name in FORMATS)]


def weight_and_residual(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    codes = torch.randint(20, 63, shape).to(torch.int8)  # all to one side: rounding to nearest would lose them all
    return torch.randn(shape).to(dtype), codes


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_mean_of_a_product_and_of_its_gradient_is_that_of_the_trained_weight(compute: str) -> None:
    dtype = FORMATS[compute.removeprefix("emulated-")]
    holder = nn.Sequential(nn.Linear(64, 32, bias=False))
    weight, codes = weight_and_residual((32, 64), dtype)
    holder[0].weight.data = weight
    held = Residuals({"0.weight": codes})
    storage.attach(holder, compute_named(compute), set(), held)
    x = torch.eye(64).requires_grad_()  # whose products are the weight itself, without a sum to be rounded
    seed = torch.eye(32).repeat(2, 1)
    outputs, gradients, count = torch.zeros(64, 32).double(), torch.zeros(64, 64).double(), 300
    for step in range(count):
        with held.felt((0, step)):
            out = holder(x)
            again = holder(x)
            (out * seed).sum().backward()
        assert torch.equal(out, again), "one step has one weight"
        outputs += out.detach().double() / count
        gradients += x.grad.double() / count
        x.grad = None
    exact, plain = join(weight, codes).double(), weight.double()
    for mean, wanted, lost in (
        (outputs, exact.T, plain.T), (gradients, exact.repeat(2, 1), plain.repeat(2, 1))
    ):  # fmt: skip
        assert (mean - wanted).norm() < 0.2 * (lost - wanted).norm()
    assert torch.equal(holder(x).detach().float(), holder.eval()(x).float()), "outside of a step nothing is drawn"


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_backward_pass_multiplies_with_the_weight_of_the_forward_pass(compute: str) -> None:
    dtype = FORMATS[compute.removeprefix("emulated-")]
    holder = nn.Sequential(nn.Linear(16, 8))
    weight, codes = weight_and_residual((8, 16), dtype)
    holder[0].weight.data = weight
    held = Residuals({"0.weight": codes})
    storage.attach(holder, compute_named(compute), set(), held)
    rows = torch.eye(16).requires_grad_()
    seed = torch.zeros(16, 8)
    seed[0] = 1.0
    with held.felt((3, 5)):
        out = holder(rows)
        (out * seed).sum().backward()
    bias = holder[0].bias.detach()
    used = (out.detach().float() - bias).T  # (8, 16): a row of the unit matrix reads a column of the weight
    drawn = storage._dithered(weight, codes, held_keys(held)).float()
    assert torch.allclose(used, drawn, atol=0.02)
    assert torch.allclose(rows.grad[0], drawn.sum(0), atol=0.05)
    assert not torch.equal(drawn, weight.float())
    assert holder[0].weight.grad.dtype is dtype
    assert torch.equal(holder[0].weight.grad.float(), torch.eye(16)[:1].expand(8, 16))
    assert torch.equal(holder[0].bias.grad, torch.ones(8))


def held_keys(held: Residuals) -> tuple[int, int]:
    with held.felt((3, 5)):
        found = held.keys_of("0.weight")
    assert found is not None
    return found


def test_rows_of_an_embedding_are_right_on_average() -> None:
    holder = nn.Sequential(nn.Embedding(6, 32))
    weight, codes = weight_and_residual((6, 32), torch.float16)
    holder[0].weight.data = weight
    held = Residuals({"0.weight": codes})
    storage.attach(holder, compute_named("emulated-float16"), set(), held)
    total, ids = torch.zeros(2, 32).double(), torch.tensor([1, 4])
    for step in range(300):
        with held.felt((0, step)):
            total += holder(ids).detach().double() / 300
    wanted = join(weight, codes).double()[ids]
    assert (total - wanted).norm() < 0.2 * (weight.double()[ids] - wanted).norm()


def test_training_at_a_small_rate_in_16_bit_products_goes_where_float32_goes(tmp_path: Path) -> None:
    """Ten steps move most weights of this model by less than half a spacing of bfloat16."""
    path = make_folder("bert", tmp_path / "bert", dtype=torch.bfloat16)
    losses = {}
    for compute in ("float32", "emulated-bfloat16"):
        scorer = folder.load(path, folder.LoadOptions(compute=compute))
        for module in scorer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        examples = from_pairs([Pair(q, d, float(i % 2)) for i, (q, d) in enumerate(PAIRS)], scorer.pairs)
        for name, parameter in scorer.model.named_parameters():
            parameter.requires_grad_(parameter.dtype is torch.bfloat16 and "embeddings" not in name)
        config = TrainConfig(steps=10, batch_size=24, lr=1e-5, schedule="constant", warmup=0.0)
        losses[compute] = train(scorer, examples, config).losses
    fell, felt = (found[0] - sum(found[5:]) / 5 for found in losses.values())
    assert fell > 0
    assert abs(felt / fell - 1) < 0.4, (fell, felt)  # rounded to nearest it goes less than half of the way
