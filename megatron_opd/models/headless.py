"""A model's forward without its output layer: the hidden states come out, for a head that is fused with the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
