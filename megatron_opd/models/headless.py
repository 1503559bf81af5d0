"""What a model's output layer reads: its hidden states alone, for a head that is fused with the loss, or beside the
logits, for a loss that rebuilds them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_opd.compat import gpt_model
from megatron_opd.models.model import Model


@contextmanager
def without_head(model: Model) -> Iterator[None]:
    """Inside, the last stage returns what its output layer would read, [1, T, hidden size], T / tp with sequence
    parallelism, in place of logits."""
    with gpt_model.without_output_layer(model.chunks):
        yield


def head_parameter(model: Model) -> Tensor:
    """The output layer's parameter [vocab / tp, hidden size] on the last stage; the embedding's where they are tied."""
    return gpt_model.head_parameter(model.chunks[-1])


class HeadInput:
    """Remembers what the last stage's output layer has read, a pass at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._seen: Tensor | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, every pass is remembered until `take`, or until the next pass."""

        def remember(hidden: Tensor) -> Tensor:
            self._seen = hidden
            return hidden

        with gpt_model.head_input(self.model.chunks, remember):
            yield

    def take(self) -> Tensor:
        """[T, hidden size] of the newest pass, whole on every tensor-parallel rank, which all call this."""
        hidden, self._seen = self._seen, None
        assert hidden is not None, "no pass of the last stage was recorded"
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.model.groups.tp)
        return hidden[:, 0].detach()
