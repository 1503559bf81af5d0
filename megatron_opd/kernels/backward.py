"""The gradient of losses on a few log-probs per token, written in one pass, over the logits themselves if wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opd.kernels.backend import kernel_backend
from megatron_opd.kernels.chunks import compute_dtype, full_precision_chunks


@torch.no_grad()
def topk_loss_backward_(
    logits: Tensor,
    log_z: Tensor,
    ids: Tensor,
    slope: Tensor,
    real_columns: int | None = None,
    *,
    out: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """From the derivatives by log-probs at `ids` to those by the logits; overwrites the logits where `out` is None.

    With z the logits, the gradient of a loss on log p(v) = z_v - log_z is, for column j of a token,

        sum over v of slope(v) [j = v]  -  softmax(z)_j * sum over v of slope(v)

    which for the top-k reverse KL, slope(v) = weight w(v) (log p(v) - log q(v)), is docs/method.md's gradient.

    logits [tokens, vocab / tp]: any floating dtype.
    log_z [tokens]: log of the summed exponentials over ALL ranks, float32 (float64).
    ids [tokens, n]: local columns; one outside [0, real_columns) is another rank's and counts in the sum alone. An id
    that occurs twice receives both slopes.
    slope [tokens, n]: derivatives of the loss by the log-probs; a row of zeros gives zeros whatever its logits hold.
    real_columns: columns from here on are padding and get 0; None: there is none.
    out: where the gradient goes, of the logits' shape and dtype; None: over the logits.
    Returns the gradient.
    """
    real = logits.shape[1] if real_columns is None else real_columns
    grad = logits if out is None else out
    if ids.shape != slope.shape or ids.dim() != 2 or ids.shape[0] != logits.shape[0] or grad.shape != logits.shape:
        raise ValueError(
            f"logits and out {list(logits.shape)}, {list(grad.shape)}, ids and slope {list(ids.shape)}, "
            f"{list(slope.shape)} must be [tokens, vocab / tp] x 2 and [tokens, n] x 2"
        )
    if kernel_backend(logits.device, logits.dtype) == "triton":
        from megatron_opd.kernels import triton_launch

        triton_launch.backward(logits, log_z, ids, slope, real, grad)
        return grad
    upstream = slope.to(compute_dtype(logits))
    total = upstream.sum(1, keepdim=True)
    pruned = (upstream == 0).all(1, keepdim=True)  # their logits may hold anything
    owned = (ids >= 0) & (ids < real)
    upstream = torch.where(owned, upstream, 0.0)
    local = torch.where(owned, ids, 0)
    for span, chunk in full_precision_chunks(logits[:, :real], log_z.dtype, chunk_tokens):
        chunk.sub_(log_z[span, None]).exp_().mul_(total[span].neg())
        chunk.scatter_add_(1, local[span], upstream[span])
        grad[span, :real] = chunk.masked_fill_(pruned[span], 0.0)
    grad[:, real:] = 0
    return grad
