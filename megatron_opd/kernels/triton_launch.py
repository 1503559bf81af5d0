"""Sizes and launches of the Triton kernels; imported when one first runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from megatron_opd.kernels import triton_kernels as kernels

LARGEST_K = 256  # the sort of the candidates stays in registers
_ENOUGH_TOKENS = 512  # several programs for each of a big GPU's processors; fewer tokens are split
_PART = 16384  # columns of a part of a row, about


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 2))


def _lanes(columns: int) -> int:
    """Groups of a row: narrow rows get fewer, so that groups have some columns; wide ones stay within registers."""
    return next((lanes for lanes in (128, 256, 512, 1024) if columns <= lanes * 40), 2048)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def stats(logits: Tensor, k: int, ids: Tensor, real: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`shard_stats` with Triton; the arguments are checked. Returns the fields of ShardStats in order."""
    if k > LARGEST_K:
        raise ValueError(f"k {k} is more than the {LARGEST_K} that the Triton kernel finds; set loss.kernels: torch")
    tokens, device = logits.shape[0], logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = max(1, real // _PART) if tokens < _ENOUGH_TOKENS else 1  # two choices: each is compiled on its own
    lanes = max(_lanes(-(-real // parts)), _power(k) if k else 0)
    width = lanes * kernels.CHUNK
    tiles = max(1, -(-real // (parts * width)))
    parts = max(1, -(-real // (tiles * width)))
    kept, depth, n = _power(k) if k else 0, triton.next_power_of_2(tiles), ids.shape[1]
    half = logits.dtype in (torch.bfloat16, torch.float16)
    readable = min(-(-real // 16) * 16, logits.shape[1])
    ids = ids.contiguous()
    lse = torch.empty((tokens, parts), dtype=torch.float32, device=device)
    values = torch.empty((tokens, parts, k), dtype=logits.dtype, device=device)
    top = torch.empty((tokens, parts, k), dtype=torch.int64, device=device)
    at_ids = torch.empty((tokens, n), dtype=torch.float32, device=device)
    invalid = torch.empty((tokens, parts), dtype=torch.int8, device=device)
    if not tokens:
        return lse[:, 0], values[:, 0], top[:, 0], at_ids, invalid[:, 0].bool()
    with _on(logits):
        kernels.stats_kernel[(tokens * parts,)](
            logits,
            logits.stride(0),
            real,
            readable,
            parts,
            tiles,
            ids,
            n,
            lse,
            values,
            top,
            at_ids,
            invalid,
            LANES=lanes,
            K=k,
            KEPT=kept,
            DEPTH=depth,
            IDS=_power(n) if n else 0,
            WIDE=not half,
            WIDE_POSITIONS=not half or tiles * lanes > 2**16,
            num_warps=min(16, max(4, lanes // 128)),
        )
    if parts == 1:
        return lse[:, 0], values[:, 0], top[:, 0], at_ids, invalid[:, 0].bool()
    # Parts ascend with the ids, so a stable sort keeps ties at the lowest id.
    best = values.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    values, top = values.flatten(1).gather(1, best), top.flatten(1).gather(1, best)
    return lse.logsumexp(1), values, top, at_ids, invalid.bool().any(1)


def backward(logits: Tensor, log_z: Tensor, ids: Tensor, slope: Tensor, real: int, grad: Tensor) -> None:
    """`topk_loss_backward_` with Triton into `grad`, which may be `logits`; the arguments are checked."""
    tokens, width = logits.shape
    if not logits.stride(1) == grad.stride(1) == 1:
        raise ValueError("the Triton kernel writes gradients of contiguous rows; make logits and out contiguous")
    if not tokens or not width:
        return
    tile = min(4096, max(128, triton.next_power_of_2(width)))
    tiles = min(8, -(-width // tile))
    blocks = -(-width // (tile * tiles))
    with _on(logits):
        kernels.backward_kernel[(tokens * blocks,)](
            logits,
            logits.stride(0),
            grad,
            grad.stride(0),
            log_z.contiguous(),
            ids.contiguous(),
            slope.contiguous(),
            ids.shape[1],
            real,
            width,
            blocks,
            tiles,
            TILE=tile,
            IDS=_power(ids.shape[1]),
            num_warps=8,
        )
