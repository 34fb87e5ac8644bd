"""The one place that decides formats: storage scheme and compute dtype, with the reason in words."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

SCHEMES = ("float32", "mixed-float16", "mixed-bfloat16", "float16", "bfloat16")
LORA = "lora-"  # before the name of a scheme: its weights are frozen, and adapters beside them are trained in float32
LORA_SCHEMES = ("lora-float32", "lora-float16", "lora-bfloat16")
COMPUTES = ("float32", "float16", "bfloat16", "emulated-float16", "emulated-bfloat16")
_FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL_MODEL, LARGE_MODEL = 100_000_000, 1_000_000_000  # parameters: the field's rule of thumb


@dataclass(frozen=True)
class Hardware:
    """What a device multiplies at full speed."""

    device: str
    float16_products: bool
    bfloat16_products: bool
    why: str


@dataclass(frozen=True)
class Compute:
    """The format of matrix products: `arithmetic` is what torch runs, `rounds_to` a narrower format it imitates."""

    name: str
    arithmetic: torch.dtype
    rounds_to: torch.dtype | None = None

    @property
    def narrow(self) -> torch.dtype | None:
        """The 16-bit format that activations take, real or emulated; None for float32."""
        return self.rounds_to or (None if self.arithmetic is torch.float32 else self.arithmetic)


@dataclass(frozen=True)
class Facts:
    """What the choice rests on; bytes are given by the caller, this module measures no memory."""

    parameters: int
    arrived: torch.dtype
    hardware: Hardware
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Precision:
    """Storage scheme, storage dtype and compute format of one model, and the fact that decided each."""

    scheme: str
    storage: torch.dtype
    compute: Compute
    reason: str

    @property
    def scales_loss(self) -> bool:
        """True where gradients pass through 16 bits, so that small ones must be scaled to survive."""
        if self.scheme.startswith(LORA):
            return self.compute.narrow is not None
        return self.storage is not torch.float32 or self.compute.narrow is not None

    def __str__(self) -> str:
        return f"{self.scheme} weights, {self.compute.name} products: {self.reason}"


def choose(facts: Facts, *, scheme: str = "auto", compute: str = "auto", frozen: bool = False) -> Precision:
    """Choose storage and compute; raises ValueError for names outside `SCHEMES`, `LORA_SCHEMES` and `COMPUTES`.

    `frozen`: the weights are not trained, adapters beside them are.
    """
    _check_name("precision", scheme, SCHEMES + LORA_SCHEMES)
    _check_name("compute", compute, COMPUTES)
    frozen, scheme = frozen or scheme.startswith(LORA), scheme.removeprefix(LORA)
    scheme, why_scheme = (scheme, "as asked") if scheme != "auto" else (_frozen if frozen else _scheme)(facts)
    storage = torch.float32 if scheme.startswith("mixed-") else _FORMATS[scheme]
    name, why_compute = (compute, "as asked") if compute != "auto" else _compute(scheme, facts.hardware)
    if frozen:
        scheme = LORA + str(storage).removeprefix("torch.")
    return Precision(scheme, storage, compute_named(name), f"scheme {why_scheme}; compute {why_compute}")


def compute_named(name: str) -> Compute:
    """The compute format of one of the names in `COMPUTES`."""
    _check_name("compute", name, COMPUTES)
    if name.startswith("emulated-"):
        return Compute(name, torch.float32, _FORMATS[name.removeprefix("emulated-")])
    return Compute(name, _FORMATS[name])


def detect(device: str | torch.device = "cpu") -> Hardware:
    """What `device` multiplies fast in 16 bits, from its capability flags; nothing is timed."""
    kind = torch.device(device).type
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Hardware(kind, major >= 6, major >= 8, f"CUDA capability {major}.{minor}")
    if kind == "mps":
        # Metal multiplies bfloat16 from macOS 14 on.
        return Hardware(kind, True, int(platform.mac_ver()[0].partition(".")[0] or 0) >= 14, "Apple GPU")
    flags = _cpu_flags() if kind == "cpu" else set()
    half = sorted(flags & {"avx512_fp16", "amx_fp16"})
    brain = sorted(flags & {"avx512_bf16", "amx_bf16"})
    named = ", ".join(half + brain) or "no 16-bit arithmetic"
    return Hardware(kind, bool(half), bool(brain), f"CPU with {named}")


def usual_device() -> str:
    """Where a model is loaded unless another device is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usual_hardware() -> Hardware:
    """That of the usual device."""
    return detect(usual_device())


def _scheme(facts: Facts) -> tuple[str, str]:
    if facts.arrived in (torch.float16, torch.bfloat16):
        name = "float16" if facts.arrived is torch.float16 else "bfloat16"
        return name, f"{name} because the weights arrived in it"
    narrow = "bfloat16" if facts.hardware.bfloat16_products else "float16"
    size = f"{facts.parameters / 1e6:.0f} M parameters"
    if facts.parameters >= LARGE_MODEL:
        return narrow, f"{narrow} for {size} (above 1 B) on a {facts.hardware.why}"
    wanted = "float32" if facts.parameters < SMALL_MODEL else f"mixed-{narrow}"
    # Weights, gradients and Adam's moments in float32 take 16 bytes a parameter before any activation.
    if facts.memory_bytes is not None and 16 * facts.parameters > facts.memory_bytes:
        return narrow, f"{narrow} because 16 bytes for each of {size} exceed {facts.memory_bytes / 2**30:.1f} GiB"
    return wanted, f"{wanted} for {size}"


def _frozen(facts: Facts) -> tuple[str, str]:
    if facts.arrived is torch.float32 and facts.parameters >= SMALL_MODEL:
        narrow = "bfloat16" if facts.hardware.bfloat16_products else "float16"
        return narrow, f"{narrow} for {facts.parameters / 1e6:.0f} M frozen parameters"
    return _scheme(facts)


def _compute(scheme: str, hardware: Hardware) -> tuple[str, str]:
    wanted = scheme.removeprefix("mixed-")
    if (wanted == "float16" and hardware.float16_products) or (wanted == "bfloat16" and hardware.bfloat16_products):
        return wanted, f"{wanted} on a {hardware.why}"
    if wanted == "float32":
        return "float32", "float32 like the weights"
    # bfloat16 has fewer mantissa bits than float16 weights: never taken for them unasked.
    return "float32", f"float32 because {wanted} products are slow on a {hardware.why}"


def _cpu_flags() -> set[str]:
    limits = f"{os.environ.get('ONEDNN_MAX_CPU_ISA', '')} {os.environ.get('ATEN_CPU_CAPABILITY', '')}".lower()
    # The user's own limit on the instruction set holds here too: oneDNN falls back to slow 16-bit code below it.
    if "avx2" in limits or "sse" in limits or "default" in limits.split():
        return set()
    return {name for name, present in torch.cpu.get_capabilities().items() if present is True}


def _check_name(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name != "auto" and name not in allowed:
        raise ValueError(f"{what} must be auto or one of {', '.join(allowed)}; got {name!r}.")
