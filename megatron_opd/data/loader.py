"""The training prompts in their order, with a position that survives a restart.

Every rank runs the same loader and gets the same batch, so nothing depends on the number of ranks.
"""

from __future__ import annotations

import random
from typing import Any

from megatron_opd.data.prompts import PromptSet
from megatron_opd.data.sources import DataError
from megatron_opd.types import Prompt


class PromptLoader:
    """Endless batches of prompts. Each epoch has an order of its own, made from the seed and the epoch alone; a batch
    may run on into the next epoch, so no prompt is left out."""

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool = True):
        if not len(prompts):
            raise DataError(f"{prompts.path}: no prompts")
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0  # prompts of this epoch handed out so far
        self._order = self._order_of(0)

    def next_batch(self, size: int) -> list[Prompt]:
        """The next `size` prompts."""
        batch: list[Prompt] = []
        while len(batch) < size:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            taken = self._order[self.position : self.position + size - len(batch)]
            batch += [self.prompts.prompts[i] for i in taken]
            self.position += len(taken)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what it stands in."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position.

        Raises:
            DataError: the position is that of another data set, seed or order; names both values.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise DataError(
                    f"{self.prompts.path}: cannot resume its position, the data's {key} was {state[key]} when saved "
                    f"and is {value} now; restore it or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.prompts.fingerprint, "seed": self.seed, "shuffle": self.shuffle}

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            # Sorted by random keys: Python keeps random() the same from version to version, but not shuffle().
            source = random.Random(f"{self.seed}/{epoch}")
            keys = [source.random() for _ in order]
            order.sort(key=keys.__getitem__)
        return order
