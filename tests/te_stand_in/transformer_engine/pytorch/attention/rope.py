"""Rotary embedding of whole rows, by each token's place in its own sequence."""

import torch


def apply_rotary_pos_emb(
    t, freqs, tensor_format="sbhd", interleaved=False, fused=False, cu_seqlens=None, cp_size=1, cp_rank=0
):
    """t [s, b, h, d] with a row of freqs [s2 >= s, 1, 1, d2 <= d] for each place; packed t [t, h, d] by cu_seqlens."""
    assert fused and not interleaved and cp_size == 1
    if tensor_format == "thd":
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        angles = freqs[torch.arange(len(t), device=t.device) - starts][:, 0]
    else:
        angles = freqs[: len(t)]
    width = angles.shape[-1]
    turned, rest = t[..., :width], t[..., width:]
    first, second = turned.chunk(2, -1)
    angles = angles.float()
    out = turned.float() * angles.cos() + torch.cat([-second, first], -1).float() * angles.sin()
    return torch.cat([out.to(t.dtype), rest], -1)
