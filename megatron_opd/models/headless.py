"""A model's forward without its output layer: the hidden states come out, for a head that is fused with the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron_opd.models.model import Model


@contextmanager
def without_head(model: Model) -> Iterator[None]:
    """Inside, the last stage returns what its output layer would read, [1, T, hidden size], T / tp with sequence
    parallelism, in place of logits.

    The layer itself stays, with its parameters; only its forward is passed over.
    """
    layers = [chunk.output_layer for chunk in model.chunks if chunk.post_process]
    for layer in layers:
        layer.forward = lambda hidden, weight=None, runtime_gather_output=None: (hidden, None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def head_parameter(model: Model) -> Tensor:
    """The output layer's parameter [vocab / tp, hidden size] on the last stage; the embedding's where they are tied."""
    chunk = model.chunks[-1]
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight
