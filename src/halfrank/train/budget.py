"""Out of memory is not the end: the token budget is halved, and the batch repeated from its start."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from halfrank.allocator import Kept, give_back, reusing_allocator, steady_allocator
from halfrank.errors import MemoryExhaustedError, is_refusal
from halfrank.memory import require, room
from halfrank.model.scorer import Scorer
from halfrank.train.examples import MicroBatch
from halfrank.train.step import random_state, restore

log = logging.getLogger("halfrank")
HALVINGS = 3
Result = TypeVar("Result")


class TokenBudget:
    """The tokens of one forward and backward pass, halved when memory is refused or a limit would be crossed.

    `limit` is what the process may hold, `bytes_per_token` what the only pass of a batch takes: both known, a pass that
    would cross the limit is not begun. Beside one of several passes lie the `gradients` of those before, and it takes
    `activations_per_token`. `plan` is shown when nothing helps. Without `splits` a batch is one pass, and nothing is
    halved. `roomy`: there is memory enough to keep freed blocks for the next step.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        limit: int | None = None,
        bytes_per_token: float = 0.0,
        activations_per_token: float | None = None,
        gradients: int = 0,
        plan: str = "",
        splits: bool = True,
        roomy: bool = True,
    ) -> None:
        self._roomy = roomy
        self._kept = Kept()
        self.tokens, self.halvings, self._splits = max_tokens, 0, splits
        self._heaviest = max_tokens  # tokens of the longest pass of the last batch
        self._limit, self._bytes_per_token, self._plan = limit, bytes_per_token, plan
        self._one_of_several = bytes_per_token if activations_per_token is None else activations_per_token
        self._gradients = gradients

    def begin(self) -> None:
        """Choose how freed memory is kept, from here on."""
        (reusing_allocator if self._roomy else steady_allocator)()

    def end(self) -> None:
        """Give back what was kept for a next step."""
        if self._roomy:
            give_back()

    def halve(self) -> None:
        """From now on passes are at most half as long as the longest of the last batch, and no freed block is kept."""
        self.tokens, self.halvings = max(min(self.tokens, self._heaviest) // 2, 1), self.halvings + 1
        self._roomy = False
        steady_allocator()
        give_back()

    def go_on(self, halvings: int, tokens: int) -> None:
        """Go on with what a run that was interrupted had come to; 0 `tokens` say that it never halved them."""
        if tokens:
            self.tokens, self.halvings, self._roomy = tokens, halvings, False

    def check(self, parts: Sequence[MicroBatch]) -> None:
        """Take note of the heaviest of `parts`; raise MemoryLimitError where it would cross the limit."""
        self._heaviest = max(min(sum(part.batch.lengths), self.tokens) for part in parts)
        if self._bytes_per_token:
            several = self._gradients + self._heaviest * self._one_of_several
            needed = int(several if len(parts) > 1 else self._heaviest * self._bytes_per_token)
            if self._roomy and needed > room(self._limit):
                give_back()  # what is only kept is no reason to refuse a pass
            require(needed, self._limit, f"A pass over {self._heaviest} tokens")

    def run(self, scorer: Scorer, attempt: Callable[[int], Result], tell: Callable[[dict[str, Any]], None]) -> Result:
        """What `attempt` gives, called with the budget; repeated with half of it, from the same random state, when
        memory runs out.

        Only memory errors are treated so. Raises MemoryExhaustedError after three halvings.
        """
        while True:
            before = random_state(scorer.device)
            try:
                result = attempt(self.tokens)
                if self._roomy:
                    self._kept.after(self._heaviest)
                return result
            except (MemoryError, RuntimeError) as error:
                if not is_refusal(error):
                    raise
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            # Outside of the handler: the error's frames hold the tensors that have to go.
            scorer.model.zero_grad(set_to_none=True)
            gc.collect()
            if scorer.device.type == "cuda":
                torch.cuda.empty_cache()
            restore(before)
            if not self._splits:
                raise MemoryExhaustedError(
                    f"Memory ran out ({reason}), and a loss of your own sees each batch whole. Train with smaller "
                    "batches or shorter pairs, or leave loss_fct out.",
                    plan=self._plan,
                )
            if self.halvings == HALVINGS or self.tokens == 1:
                raise MemoryExhaustedError(
                    f"Memory ran out at {self.tokens} tokens a pass as well ({reason}). Train with checkpointing, "
                    "released gradients or shorter pairs; halfrank plan says what each needs.",
                    plan=self._plan,
                )
            self.halve()
            tell({"event": "memory", "reason": reason, "max_tokens": self.tokens})
            log.warning("Memory ran out (%s): passes of at most %d tokens from now on.", reason, self.tokens)
