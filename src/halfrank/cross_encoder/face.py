"""`CrossEncoder`: the names, arguments and return shapes that sentence-transformers users know."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from halfrank.cross_encoder import features, fitting, folders, loaders, merging
from halfrank.cross_encoder import pool as workers
from halfrank.cross_encoder.card import ModelCardData, write_card
from halfrank.cross_encoder.names import (
    load_options,
    one_of,
    parse_storage,
    refuse_unsupported,
    warn_unused,
    with_owner,
)
from halfrank.cross_encoder.pairs import PredictReport, Readout, as_documents, as_pairs, is_single, shaped
from halfrank.errors import Interrupted
from halfrank.memory import parse_size
from halfrank.model import adapters, folder
from halfrank.model.activation import activation_named
from halfrank.model.families import position_limit
from halfrank.model.pace import USUAL, tokens_a_pass
from halfrank.model.scorer import IDENTITY, Scorer, log
from halfrank.numerics.adamw import AdamW
from halfrank.precision import Facts, choose, detect
from halfrank.predict import Scores, predict
from halfrank.train.examples import from_pairs
from halfrank.train.loop import train
from halfrank.train.planning import check_choices

BATCH_SIZE = 32  # the peer's usual one, which stands for no wish of one's own
Real = float  # in the class body `float` is a method


class CrossEncoder:
    """A model that scores pairs of texts: load, `predict`, `rank`, `fit`, `save`.

    `model_kwargs` with `torch_dtype` (or `dtype`) says how weights are stored; `compute` how products run. A causal
    model without `num_labels` scores yes against no, `template` says how pairs are put to one whose folder does not:
    "qwen3", "mxbai", "bge" or "plain"; prompts are its instructions. The names of
    sentence-transformers 2.x to 5.x are accepted beside the current ones; an unknown argument is a TypeError.
    `backend` "onnx" or "openvino" scores with the graph of a folder that `halfrank export --format` wrote, or any other
    that has one; `model_kwargs={"file_name": ...}` names one of several. Such a model has no weights to train or save.
    """

    model_type = "CrossEncoder"
    model_card_data_class = ModelCardData
    default_huggingface_organization = "cross-encoder"
    module_kwargs: Mapping[str, Any] = {}
    is_hpu_graph_enabled = False

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Callable[[Tensor], Tensor] | str | None = None,
        device: str | torch.device | None = None,
        *,
        cache_folder: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        model_card_data: Any = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        modules: object = None,
        compute: str = "auto",
        template: str | None = None,
        model_name: str | os.PathLike[str] | None = None,
        automodel_args: Mapping[str, Any] | None = None,
        tokenizer_args: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        config_args: Mapping[str, Any] | None = None,
        default_activation_function: Callable[[Tensor], Tensor] | None = None,
        classifier_dropout: Real | None = None,
        cache_dir: str | None = None,
    ) -> None:
        refuse_unsupported(modules=modules)
        path = one_of(model_name_or_path=model_name_or_path, model_name=model_name)
        if path is None:
            raise TypeError("CrossEncoder needs model_name_or_path: a folder or a hub id.")
        path = with_owner(path, self.default_huggingface_organization)
        if isinstance(activation_fn, (str, torch.device)):  # the fourth argument was the device before 4.0
            activation_fn, device = None, one_of(device=device, activation_fn=activation_fn)
        options = load_options(
            backend=backend,
            num_labels=num_labels,
            device=device,
            cache_folder=one_of(cache_folder=cache_folder, cache_dir=cache_dir),
            trust_remote_code=trust_remote_code,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            model_kwargs=one_of(model_kwargs=model_kwargs, automodel_args=automodel_args),
            processor_kwargs=one_of(
                processor_kwargs=processor_kwargs, tokenizer_kwargs=tokenizer_kwargs, tokenizer_args=tokenizer_args
            ),
            config_kwargs=one_of(config_kwargs=config_kwargs, config_args=config_args),
            classifier_dropout=classifier_dropout,
            compute=compute,
            islands=keep_in_fp32_modules,
        )
        self._compute = compute
        self.backend = backend
        self.trust_remote_code = trust_remote_code
        self._scorer = folder.load(path, replace(options, template=template))
        self._stored_activation = self._scorer.activation
        self._vocabulary = len(self._scorer.tokenizer)
        warn_unused(self.config, options)
        if max_length is not None:
            self.max_length = max_length
        stored = folder.settings_of(path, options)
        self.prompts = {name: text or "" for name, text in {**stored.get("prompts", {}), **(prompts or {})}.items()}
        self.default_prompt_name = one_of(default_prompt_name=default_prompt_name) or stored.get("default_prompt_name")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name={self.default_prompt_name!r} is not among prompts {list(self.prompts)}."
            )
        self.model_card_data = ModelCardData() if model_card_data is None else model_card_data
        given = one_of(activation_fn=activation_fn, default_activation_function=default_activation_function)
        self.activation_fn = given if given is not None else activation_named(self._scorer.activation)

    # What the model is

    @property
    def model(self) -> Any:
        """The transformers model; its own padded call stays right."""
        self._scorer.needs_weights("The transformers model")
        return self._scorer.model

    @property
    def transformers_model(self) -> Any:
        """The newer name of `model`."""
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._scorer.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._scorer.tokenizer = value
        self._vocabulary = -1

    @property
    def processor(self) -> Any:
        """The tokenizer: this class reads texts only."""
        return self._scorer.tokenizer

    @property
    def modalities(self) -> list[str]:
        """What can be scored: texts."""
        return ["text"]

    def supports(self, modality: str | tuple[str, ...]) -> bool:
        """Whether a kind of input can be scored."""
        return modality in self.modalities

    def get_backend(self) -> str:
        """What computes: "torch", "onnx" or "openvino"."""
        return self.backend

    def get_model_kwargs(self) -> list[str]:
        """Extra arguments that the model's forward pass takes: none."""
        return []

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._scorer.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._scorer.device

    @property
    def dtype(self) -> torch.dtype:
        """The format in which matrices are stored."""
        return self._scorer.precision.storage

    @property
    def num_labels(self) -> int:
        """Scores per pair."""
        return self._scorer.num_labels

    @property
    def activation_fn(self) -> Callable[[Tensor], Tensor]:
        """What turns float32 logits into scores."""
        return self._activation

    @activation_fn.setter
    def activation_fn(self, value: Callable[[Tensor], Tensor]) -> None:
        if not callable(value):
            raise TypeError(f"activation_fn must be callable, for example torch.nn.Sigmoid(); got {value!r}.")
        self._activation = value
        kind = type(value)
        usual = "torch.nn.modules.activation.Sigmoid" if self.num_labels == 1 else IDENTITY
        # A folder names an activation and runs no code: only torch's own can be stored.
        stored = f"{kind.__module__}.{kind.__qualname__}"
        self._scorer.activation = stored if stored.startswith("torch.nn.modules.") else usual

    def get_default_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation that the folder names, or sigmoid for one label and none for more."""
        return activation_named(self._stored_activation)

    @property
    def default_activation_function(self) -> Callable[[Tensor], Tensor]:
        """The older name of `activation_fn`."""
        return self.activation_fn

    @default_activation_function.setter
    def default_activation_function(self, value: Callable[[Tensor], Tensor]) -> None:
        self.activation_fn = value

    @property
    def max_length(self) -> int:
        """Longest pair in tokens; longer ones are truncated. None sets it to what the model holds."""
        return self._scorer.max_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        limit = position_limit(self._scorer.model)
        if value is None:
            value = limit or 512
        if value < 4:
            raise ValueError(f"max_length must be at least 4 tokens; got {value}.")
        if limit is not None and value > limit:
            log.warning("max_length=%d is more than the model's %d positions: %d is used.", value, limit, limit)
            value = limit
        self._scorer.tokenizer.model_max_length = value  # saved with the tokenizer
        self._scorer.max_length = value

    @property
    def max_seq_length(self) -> int:
        """The newer name of `max_length`."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.max_length = value

    def get_max_seq_length(self) -> int:
        """The older form of `max_seq_length`."""
        return self.max_length

    @property
    def keep_in_fp32_modules(self) -> list[str]:
        """The modules that compute in float32 in whatever format the rest does, named as sentence-transformers does."""
        return [f"{folder.PEER_PREFIX}{name}" for name in self._scorer.islands]

    def set_keep_in_fp32_modules(self, module_names: Sequence[str]) -> None:
        """Let these modules compute in float32 and no others; raises ValueError for an unknown name."""
        if isinstance(module_names, str) or any(not isinstance(name, str) for name in module_names):
            raise ValueError(f"keep_in_fp32_modules must be a list of module names; got {module_names!r}.")
        self._scorer.islands = [folder.own_name(name) for name in module_names]

    @property
    def training(self) -> bool:
        """True while dropout is on."""
        return self._scorer.model.training

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the transformers model."""
        return self.model.parameters(recurse)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the transformers model, with its names."""
        return self.model.named_parameters(prefix, recurse)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the transformers model, with its names."""
        return self.model.state_dict()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
        if getattr(self.model.base_model, "supports_gradient_checkpointing", False):
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        else:  # ALBERT and MPNet
            self._scorer.checkpointing = True

    @classmethod
    def merge(
        cls,
        models: Sequence[str | os.PathLike[str] | CrossEncoder],
        method: str = "linear",
        *,
        parameters: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype = torch.float32,
        out_dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CrossEncoder:
        """A new model whose weights are the average of several fine-tunes of one model, by `parameters["weight"]`.

        Sums are float32 and know what 16-bit training kept beside the weights. Prompts and settings are the first's.
        """
        if method != "linear" or parse_storage(dtype) is not torch.float32:
            raise ValueError(f"merge averages linearly, in float32; got method={method!r}, dtype={dtype!r}.")
        if isinstance(models, (str, os.PathLike, CrossEncoder)):
            raise TypeError(f"merge takes a list of models or folders; got {type(models).__name__}.")
        loaded = [model if isinstance(model, CrossEncoder) else cls(model, device="cpu") for model in models]
        weights = merging.average([model._scorer for model in loaded], parameters)
        merged = copy.deepcopy(loaded[0]).float()
        merged.model.load_state_dict(weights)
        merged.model_card_data = ModelCardData()
        return merged.eval().to(device, parse_storage(out_dtype) or torch.float32)

    # Where and in which format

    def to(
        self, *targets: str | int | torch.device | torch.dtype, device: Any = None, dtype: Any = None
    ) -> CrossEncoder:
        """Move weights to a device, store them in a dtype, or both, in place.

        Raises NonFiniteWeightError, with no weight changed, when the dtype cannot hold them.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        before = self.device
        if device is not None:
            self._scorer.to(torch.device(device))
            self._scorer.residuals.update({name: t.to(self.device) for name, t in self._scorer.residuals.items()})
        storage = parse_storage(dtype) or self.dtype
        if storage is not self.dtype or before.type != self.device.type:
            self._store(storage)
        return self

    def half(self) -> CrossEncoder:
        """Store weights in float16, in place."""
        return self.to(torch.float16)

    def bfloat16(self) -> CrossEncoder:
        """Store weights in bfloat16, in place."""
        return self.to(torch.bfloat16)

    def float(self) -> CrossEncoder:
        """Store weights in float32, in place, joined with what 16-bit training kept beside them."""
        return self.to(torch.float32)

    def cpu(self) -> CrossEncoder:
        """Move weights to the CPU, in place."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> CrossEncoder:
        """Move weights to a GPU, in place."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def train(self, mode: bool = True) -> CrossEncoder:
        """Turn dropout on or off; `fit` and `predict` do it by themselves."""
        self._scorer.model.train(mode)
        return self

    def eval(self) -> CrossEncoder:
        """Turn dropout off."""
        return self.train(False)

    # Scores

    def predict(
        self,
        inputs: Any = None,
        batch_size: Any = 32,
        show_progress_bar: bool | str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        pool: workers.Pool | None = None,
        chunk_size: int | None = None,
        *,
        return_report: bool = False,
        sentences: Any = None,
        activation_fct: Callable[[Tensor], Tensor] | None = None,
        num_workers: int | None = None,
    ) -> Any:
        """Float32 scores of pairs (P,) or (P, labels), always finite; of one pair its own score.

        With `return_report` the answer is (scores, report): how many pairs were cut, which were scored again because
        the compute format overflowed, and which modules compute in float32 from then on.

        Raises DataError for what is not a pair of texts, NonFiniteScoreError for a pair without a finite score.
        """
        if isinstance(batch_size, str):  # 6.x has prompt_name and prompt in these two places
            batch_size, prompt_name = 32, batch_size
        if isinstance(show_progress_bar, str):
            show_progress_bar, prompt = None, show_progress_bar
        _warn_ignored("predict", num_workers=num_workers)
        if inputs is None and sentences is None:
            raise TypeError("predict needs pairs of texts: model.predict([('query', 'document')]).")
        pairs, single = as_pairs(inputs if inputs is not None else sentences)
        told = self._prompt(prompt, prompt_name)
        activation = one_of(activation_fn=activation_fn, activation_fct=activation_fct)
        readout = Readout(self.activation_fn if activation is None else activation, bool(apply_softmax))
        budget = self._budget(batch_size)
        # Workers share the machine: what is fastest for one alone is not measured beside others.
        a_pass = budget or tokens_a_pass(self._scorer, 0)
        if not pairs:
            found = Scores(np.zeros(0, np.float32), 0, ())
        elif pool is not None:
            found = workers.scores(pool, pairs, readout, instruction=told, max_tokens=a_pass, chunk_size=chunk_size)
        elif isinstance(device, (list, tuple)):
            self._scorer.needs_weights("A pool of processes")
            with workers.temporary(self._refreshed(), device) as own:
                found = workers.scores(own, pairs, readout, instruction=told, max_tokens=a_pass, chunk_size=chunk_size)
        else:
            found = self._scores(pairs, readout, told, budget, show_progress_bar, device)
        values = shaped(
            found.values, single=single, to_tensor=convert_to_tensor, to_numpy=convert_to_numpy, device=self.device
        )
        return (values, PredictReport(found.truncated, found.rescued, found.islands)) if return_report else values

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: Any = 32,
        show_progress_bar: bool | str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        pool: workers.Pool | None = None,
        chunk_size: int | None = None,
        activation_fct: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = None,
        convert_to_numpy: bool | None = None,
        convert_to_tensor: bool | None = None,
        num_workers: int | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by score, best first: `corpus_id`, `score` and, if asked, `text`; equal scores keep their order."""
        if self.num_labels != 1:
            raise ValueError(f"rank needs a model with one label; this one has {self.num_labels}. Use predict.")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k is how many documents are wanted, or None for all; got {top_k}.")
        _warn_ignored(
            "rank",
            num_workers=num_workers,
            apply_softmax=apply_softmax,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
        )
        texts = as_documents(documents)
        scores = self.predict(
            [(query, text) for text in texts],
            batch_size,
            show_progress_bar,
            one_of(activation_fn=activation_fn, activation_fct=activation_fct),
            prompt_name=prompt_name,
            prompt=prompt,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
        ).tolist()
        order = sorted(range(len(texts)), key=lambda index: scores[index], reverse=True)[:top_k]
        ranked = [{"corpus_id": index, "score": scores[index]} for index in order]
        return [entry | {"text": texts[entry["corpus_id"]]} for entry in ranked] if return_documents else ranked

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `predict` reads `inputs` as one pair."""
        return is_single(inputs)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None) -> Any:
        """Padded token ids of texts or pairs, as a mapping of tensors for `forward`."""
        return features.features_of(self._scorer, inputs, prompt)

    def tokenize(self, texts: Sequence[Any]) -> Any:
        """The older name of `preprocess`."""
        return self.preprocess(texts)

    def forward(self, input: Any) -> Any:
        """What `preprocess` gave with "scores" added: float32 logits (P, labels), with gradients."""
        self._scorer.needs_weights("A forward pass with gradients")
        return features.with_scores(self._refreshed(), input)

    __call__ = forward

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | None = None) -> Any:
        """What `evaluator(model, output_path)` returns; an evaluator of sentence-transformers works."""
        if output_path is not None:
            os.makedirs(output_path, exist_ok=True)
        return evaluator(self, output_path)

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> workers.Pool:
        """Start one process for each device, for `predict(..., pool=...)`; call under `if __name__ == "__main__":`."""
        self._scorer.needs_weights("A pool of processes")
        return workers.start(self._refreshed(), target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: workers.Pool) -> None:
        """End the processes of a pool."""
        workers.stop(pool)

    # Training

    def fit(
        self,
        train_dataloader: Iterable[Any],
        evaluator: Callable[..., Any] | None = None,
        epochs: int = 1,
        loss_fct: Any = None,
        activation_fct: Callable[[Tensor], Tensor] = nn.Identity(),
        scheduler: str = "WarmupLinear",
        warmup_steps: int = 10000,
        optimizer_class: Callable[..., torch.optim.Optimizer] = AdamW,
        optimizer_params: Mapping[str, Any] | None = None,
        weight_decay: Real = 0.01,
        evaluation_steps: int | None = 0,
        output_path: str | os.PathLike[str] | None = None,
        save_best_model: bool = True,
        max_grad_norm: Real | None = 1,
        use_amp: bool = False,
        callback: fitting.Callback | None = None,
        show_progress_bar: bool = True,
        *,
        memory: str | None = None,
        release_gradients: str = "auto",
        checkpointing: str = "auto",
    ) -> None:
        """Train in place on a loader of examples with `.texts` and `.label`; 16-bit weights stay 16-bit.

        `optimizer_params` is {"lr": 2e-5} when not given. `output_path` receives the best model by the evaluator, or
        the last one without an evaluator. `memory` is what the process may hold, such as "16GiB", else all that is
        free; the two settings after it are auto, yes or no, as those of `halfrank train`.

        Raises DataError for bad examples and ValueError for bad settings before the first step, TrainingError where the
        run fits in memory in no way or recovery comes to its limits, KeyboardInterrupt after Ctrl-C between two steps.
        The plan of its memory, and what was measured, are logged as information, what recovery did as a warning.
        """
        self._scorer.needs_weights("Training")
        limit = None if memory is None else parse_size(memory)
        check_choices(release_gradients, checkpointing)
        params = {"lr": 2e-5} if optimizer_params is None else dict(optimizer_params)
        default_loss = loss_fct is None and type(activation_fct) is nn.Identity
        config = fitting.config_of(
            epochs=epochs,
            scheduler=scheduler,
            warmup_steps=warmup_steps,
            optimizer_params=params,
            weight_decay=weight_decay,
            evaluation_steps=evaluation_steps,
            max_grad_norm=max_grad_norm,
            default_loss=default_loss,
        )
        scorer = self._refreshed()
        material = loaders.read_loader(train_dataloader, epochs)
        loaders.check_labels(material.pairs, self.num_labels, default_loss)
        optimizer = fitting.optimizer_for(scorer, optimizer_class, params, config)
        scorer.residuals.clear()  # an earlier fit's, which its own optimizer kept up to date
        best = fitting.Best(
            self,
            evaluator,
            folder=output_path,
            keep_best=save_best_model,
            callback=callback,
            steps_per_epoch=len(material.epochs[0]),
        )
        scorer.instruction = self._prompt(None, None)  # what it is told when it predicts, it is told when it learns
        with fitting.training_in(scorer, fitting.amp_precision(scorer) if use_amp else scorer.precision):
            try:
                examples = from_pairs(material.pairs, scorer.pairs)
                run = fitting.planned_run(
                    scorer, examples, config, material.epochs[0], optimizer, splits=default_loss, limit=limit,
                    release=release_gradients, checkpointing=checkpointing,
                )  # fmt: skip
                train(
                    scorer,
                    examples,
                    run.config,
                    budget=run.budget,
                    loss=fitting.loss_function(loss_fct, activation_fct, scorer),
                    plan=lambda epoch: material.epochs[epoch],
                    optimizer=optimizer,
                    evaluate=None if evaluator is None else best.evaluate,
                    shown=show_progress_bar,
                    seeded=False,
                )
                run.compare()
            except Interrupted:
                best.finish()
                where = f"; a model is in '{output_path}'" if output_path is not None else ""
                raise KeyboardInterrupt(f"fit was stopped between two steps{where}.") from None
        best.finish()

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Freeze the weights and train LoRA adapters beside them from now on, and the score head: `fit`, then `save`.

        `adapter_config` is a rank, or a LoraConfig of peft; without its `target_modules` every Linear of the body has
        an adapter. Needs the extra [lora]. Raises ModelError where the model has adapters, or was trained since it was
        loaded: adapters are saved without it.
        """
        if adapter_name not in (None, adapters.NAME):
            raise ValueError(f"A model has one set of adapters here, named {adapters.NAME!r}; got {adapter_name!r}.")
        self._scorer.needs_weights("Training adapters")
        scorer = self._refreshed()
        rank = isinstance(adapter_config, int) and not isinstance(adapter_config, bool)
        adapters.add(scorer, adapters.settings(scorer.model, adapter_config) if rank else adapter_config)

    def merge_adapters(self, dtype: torch.dtype = torch.float32) -> None:
        """Add the adapters to the weights beside them and store all in `dtype`: a plain model from then on."""
        adapters.merge(self._scorer, dtype)

    old_fit = fit  # sentence-transformers kept the loop of 3.x beside; here one loop does both

    def smart_batching_collate(self, batch: Sequence[Any]) -> tuple[Any, Tensor]:
        """Padded ids and labels of examples with `.texts` and `.label`, for a training loop of one's own."""
        encoded = self.smart_batching_collate_text_only([example.texts for example in batch])
        return encoded, features.labels_of(self._scorer, [example.label for example in batch])

    def smart_batching_collate_text_only(self, batch: Sequence[Sequence[str]]) -> Any:
        """Padded ids of pairs of texts."""
        return features.collated(self._scorer, batch)

    # Folders

    def save(
        self,
        path: str | os.PathLike[str],
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Write a folder that halfrank, transformers and sentence-transformers load; whole or not at all.

        `dtype` is the storage dtype unless given; float32 joins 16-bit weights with what training kept beside them.
        A 16-bit folder is certified on probe pairs. Raises CertificateError where it scores too far from the model in
        float32, which is then saved in float32 beside it: "path-float32".
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: halfrank writes no pickles, only safetensors.")
        kind = type(self.activation_fn)
        if self._scorer.activation != f"{kind.__module__}.{kind.__qualname__}":
            log.warning("%s is not torch's own activation and is not stored: pass it again on loading.", kind.__name__)
        card = write_card(self._scorer, self.model_card_data, model_name, train_datasets) if create_model_card else None
        prompts = {"prompts": self.prompts, "default_prompt_name": self.default_prompt_name}
        folders.write(self._scorer, Path(path), dtype=parse_storage(dtype), card=card, settings=prompts)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """The other name of `save`."""
        self.save(path, model_name, create_model_card, train_datasets, safe_serialization, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to a hub repository, made if absent, and return the address of the commit or pull request.

        A card that is there already stays unless `replace_model_card`. Raises HubError, with what the hub said.
        """
        if create_pr and revision not in (None, "main"):
            raise ValueError(f"A pull request goes to the main branch: drop create_pr or revision={revision!r}.")
        hub = folders.Repository(
            repo_id, token=token, private=private, exist_ok=exist_ok or create_pr, revision=revision
        )
        message = commit_message or "Add new CrossEncoder model"
        if local_model_path is not None:
            return hub.upload(local_model_path, message, create_pr)
        with tempfile.TemporaryDirectory() as stage:
            self.save(stage, hub.name, replace_model_card or not hub.has_card(), train_datasets, safe_serialization)
            return hub.upload(stage, message, create_pr)

    def save_to_hub(
        self,
        repo_id: str | None = None,
        organization: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str = "Add new model.",
        local_model_path: str | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: list[str] | None = None,
        *,
        repo_name: str | None = None,
    ) -> str:
        """The older form of `push_to_hub`."""
        repo_id = one_of(repo_id=repo_id, repo_name=repo_name)
        if repo_id is None:
            raise TypeError("save_to_hub needs repo_id, such as 'owner/name'.")
        if organization is not None and "/" in repo_id and not repo_id.startswith(f"{organization}/"):
            raise ValueError(
                f"repo_id={repo_id!r} names another owner than organization={organization!r}: give repo_id alone."
            )
        if organization is not None and "/" not in repo_id:
            repo_id = f"{organization}/{repo_id}"
        return self.push_to_hub(
            repo_id, token, private, safe_serialization, commit_message, local_model_path, exist_ok, replace_model_card,
            train_datasets,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        self._scorer.needs_weights("A copy")
        own = {name: value for name, value in vars(self).items() if name != "_scorer"}
        return own | {"_scorer": workers.portable(self._scorer), "_device": str(self.device)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        scorer, device = state.pop("_scorer"), state.pop("_device")
        vars(self).update(state, _scorer=workers.from_portable(scorer, device))

    def __repr__(self) -> str:
        scorer = self._scorer
        if scorer.engine is not None:
            return (
                f"CrossEncoder({self.config.model_type}, {self.num_labels} label(s), max_length={self.max_length}, "
                f"{scorer.engine.path.name} in {scorer.engine.name}, {scorer.compute.name} products, cpu)"
            )
        path = "packed" if scorer.packed else "padded"
        return (
            f"CrossEncoder({self.config.model_type}, {self.num_labels} label(s), max_length={self.max_length}, {path}, "
            f"{scorer.precision.scheme} weights, {scorer.compute.name} products, {self.device})"
        )

    def _scores(
        self,
        pairs: list[tuple[str, str]],
        readout: Readout,
        instruction: str,
        max_tokens: int | None,
        shown: bool | None,
        device: Any,
    ) -> Scores:
        if device is not None:
            self.to(device)
        # Bars on request, or where the user has asked for information.
        visible = log.getEffectiveLevel() <= logging.INFO if shown is None else shown
        with Progress(console=Console(stderr=True), disable=not visible) as bar:
            task = bar.add_task("scoring", total=len(pairs))
            advance = partial(bar.advance, task)
            result = predict(
                self._refreshed(), pairs, activation=readout, instruction=instruction, max_tokens=max_tokens,
                progress=advance,
            )  # fmt: skip
        if result.rescued:
            text = "%d of %d pairs were not finite in %s and were scored again in float32 where needed."
            log.warning(text, len(result.rescued), len(pairs), self._scorer.compute.name)
        return result

    def _budget(self, batch_size: int | None) -> int | None:
        """Tokens of a forward pass; None for what is fastest here, which is meant where nobody asks for a size."""
        size = BATCH_SIZE if batch_size is None else batch_size
        if size <= 0:
            raise ValueError(f"batch_size must be 1 or more; got {size}.")
        wanted = size * self.max_length
        # On a CPU longer rows than usual are no faster; on a GPU the caller knows what fits.
        return None if size == BATCH_SIZE else min(wanted, USUAL) if self.device.type == "cpu" else wanted

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        if prompt is not None:
            if prompt_name is not None:
                log.warning("prompt and prompt_name were both given: prompt is used.")
            return prompt
        name = prompt_name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name={name!r} is not among the model's prompts {list(self.prompts)}.")
        return self.prompts[name]

    def _store(self, storage: torch.dtype) -> None:
        scorer = self._scorer
        facts = Facts(scorer.model.num_parameters(), storage, detect(self.device))
        scheme, frozen = str(storage).removeprefix("torch."), scorer.adapters is not None
        scorer.adopt(choose(facts, scheme=scheme, compute=self._compute, frozen=frozen))

    def _refreshed(self) -> Scorer:
        """The scorer, its private tokenizer and its patched modules renewed after tokens were added."""
        scorer = self._scorer
        if len(scorer.tokenizer) != self._vocabulary:
            self._vocabulary = len(scorer.tokenizer)
            scorer.max_length = scorer.max_length
            scorer.adopt(scorer.precision)
        return scorer


def _warn_ignored(method: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            log.warning("%s: %s is ignored, it has no effect any more.", method, name)
