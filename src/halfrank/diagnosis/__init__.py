"""Why a step or a score is not finite, or trains wrongly: replayed under observation, to one of a list of causes."""

from __future__ import annotations

from halfrank.diagnosis.finding import Cause, Finding, PairReference
from halfrank.diagnosis.replay import diagnose, explain_scores, explain_state, explain_step, explain_weights

__all__ = [
    "Cause",
    "Finding",
    "PairReference",
    "diagnose",
    "explain_scores",
    "explain_state",
    "explain_step",
    "explain_weights",
]
