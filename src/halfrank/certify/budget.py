"""What a narrow copy may cost before it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

# Largest score error, in units of the reference scores' spread or of 1, whichever is larger. Sound copies of MiniLM,
# mpnet and six tiny families reach 0.0006 in float16 and 0.003 in bfloat16; a trained model's scores lie further apart.
SCORE_ERROR = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05, torch.int8: 0.1}


@dataclass(frozen=True)
class Budget:
    """Limits of a certificate; None: measured, not limited."""

    max_score_error: float = 0.01
    max_mean_score_error: float | None = None
    min_kendall_tau: float | None = 0.8  # mean over queries whose scores are further apart than the score error allowed
    min_top10_overlap: float | None = 0.8  # likewise
    max_ndcg_loss: float | None = None
    max_new_ties: int | None = None
    min_headroom_bits: float = 0.0
    max_weight_ulps: float | None = 1.0  # distance from the reference in units of the last place; None: not a copy
    max_invariance_error: float = 1e-4  # of the largest logit, when the same pairs are batched or padded otherwise

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (value >= 0 or name in ("min_kendall_tau", "min_headroom_bits")):
                raise ValueError(f"{name} must be 0 or more; got {value!r}.")


def budget_for(
    storage: torch.dtype, limits: Mapping[str, float | int | None] | None = None, *, copied: bool = True
) -> Budget:
    """The usual limits for copies stored in `storage`, with those of `limits` that are not None in their place.

    Without `copied` the model was trained apart from its reference: weights are not compared.
    """
    given = {name: value for name, value in (limits or {}).items() if value is not None}
    usual = Budget(max_score_error=SCORE_ERROR[storage], max_weight_ulps=1.0 if copied else None)
    return replace(usual, **given)  # type: ignore[arg-type]
