"""Every exception of halfrank, and how a lack of memory is known; a message says rule, what came, remedy and place."""

from __future__ import annotations

from collections.abc import Sequence

# How torch's allocators say no: its own OutOfMemoryError is a RuntimeError with the last of these words, and naming the
# class here would cost every start an import of torch.
REFUSED = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "out of memory")


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that memory was refused, by the processor's allocator or a GPU's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in REFUSED)


class HalfrankError(Exception):
    """Base of all errors that halfrank raises on purpose."""


class DataError(HalfrankError, ValueError):
    """A row, a label or a text that cannot be used; names the file and line where there is one."""


class ModelError(HalfrankError, ValueError):
    """A model folder that cannot be read, or a model that cannot do what is asked."""


class NonFiniteWeightError(ModelError):
    """Weights that are NaN or infinite, or that leave the range of the format they are stored in.

    `tensors` are the names of the weights; `out_of_range` says that a wider format holds them.
    """

    def __init__(self, message: str, *, tensors: Sequence[str] = (), out_of_range: bool = False) -> None:
        super().__init__(message)
        self.tensors, self.out_of_range = tuple(tensors), out_of_range


class CertificateError(ModelError):
    """A narrow copy that is too far from its float32 reference; names the modules, and where a float32 copy lies."""


class NonFiniteScoreError(HalfrankError, ArithmeticError):
    """A pair whose score stays non-finite even in float32."""


class NonFiniteUpdateError(HalfrankError, ArithmeticError):
    """An optimizer update that is not finite; nothing of the step was stored."""


class TornUpdateError(NonFiniteUpdateError):
    """An update that ended half-way through the model: only an earlier state of the run is whole.

    `out_of_memory` says that nothing was wrong with it but a lack of memory.
    """

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class TrainingError(HalfrankError, RuntimeError):
    """A training run that cannot go on; what was trained so far is kept. `finding` says why, where known."""

    def __init__(self, message: str, *, finding: object | None = None) -> None:
        super().__init__(message)
        self.finding = finding


class DoesNotFitError(TrainingError):
    """A run that fits into memory in no way of its precision; `instead` is a precision in which it would, or None."""

    def __init__(self, message: str, *, instead: str | None = None) -> None:
        super().__init__(message)
        self.instead = instead


class MemoryExhaustedError(TrainingError):
    """Memory that ran out at the smallest token budget as well; nothing of the step was stored. `plan` is a table."""

    def __init__(self, reason: str, *, plan: str = "") -> None:
        super().__init__(f"{reason}\n{plan}" if plan else reason)
        self.reason, self.plan = reason, plan


class MemoryLimitError(HalfrankError, MemoryError):
    """Memory that a step would take beyond the limit, or a run that fits in no way; nothing was stored."""


class SaveError(HalfrankError, OSError):
    """A folder that could not be written; nothing partial is left behind."""


class HubError(HalfrankError, OSError):
    """A hub that refused a request or could not be reached."""


class MissingExtraError(HalfrankError, ImportError):
    """A feature that needs an optional package; the message names the extra to install."""


class Interrupted(HalfrankError):
    """A run stopped by the user after its state was saved."""
