"""One change of a scored batch before it is trained on; targets.py and response_weights.py have them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from megatron_opd.types import ScoredBatch


class Target(ABC):
    """Base of all. Every rank has the same batch and must make the same of it."""

    @abstractmethod
    def of(self, batch: ScoredBatch) -> ScoredBatch:
        """The batch to train on; `batch` stays as it is. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from it."""
