"""The layers that Megatron-Core derives its own from."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from transformer_engine.pytorch import distributed, fp8, router, tensor
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, Scale, fp8_autocast, fp8_model_init, rounded
from transformer_engine.pytorch.tensor import QuantizedTensor, parameter

__all__ = ["distributed", "fp8", "fp8_autocast", "fp8_model_init", "router", "tensor"]
ops = SimpleNamespace(Sequential=None, FusibleOperation=None)  # named in signatures


class _Base(torch.nn.Module):
    """What every layer with weights has: the state of FP8, in `_fp8_workspaces` the rounded weights, extra state."""

    def __init__(self, tp_group, tp_size: int, sequence_parallel: bool, fuse_wgrad_accumulation: bool) -> None:
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self._fp8_workspaces: dict[str, Tensor] = {}
        self._scales: dict[str, Scale] = {}

    def get_extra_state(self) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, first: bool | None) -> Tensor:
        if not FP8GlobalStateManager.enabled:
            return linear(x, weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias)
        for operand in (x, weight):
            if math.prod(operand.shape[:-1]) % 8 or operand.shape[-1] % 16:
                raise AssertionError(
                    "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the "
                    f"last dimension to be divisible by 16, but got tensor with dims={list(operand.shape)}"
                )
        copy = self._copy(weight, name, first)
        x8 = x + (rounded(x.detach(), self._scale(f"{name} input")) - x.detach())
        if not isinstance(weight, QuantizedTensor):
            copy = weight + (copy - weight.detach())  # the gradient passes the rounding by
        return linear(x8, copy, bias)

    def _copy(self, weight: Tensor, name: str, first: bool | None) -> Tensor:
        """The weight in FP8, kept until a pass says that it is the first one since the parameters have changed."""
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize()
        if first is None or first or name not in self._fp8_workspaces:
            self._fp8_workspaces[name] = rounded(weight.detach(), self._scale(name))
        return self._fp8_workspaces[name]

    def _scale(self, name: str) -> Scale | None:
        if not FP8GlobalStateManager.recipe.is_delayed:
            return None
        if name not in self._scales:
            self._scales[name] = Scale()
        return self._scales[name]


class Linear(_Base):
    save_original_input = False

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        **_,
    ) -> None:
        super().__init__(tp_group, tp_size, sequence_parallel, fuse_wgrad_accumulation)
        self.parallel_mode, self.return_bias, self.use_bias = parallel_mode, return_bias, bias
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self._parameters_of(params_dtype, device)

    def _parameters_of(self, dtype, device) -> None:
        values = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device).fill_(0.5)
        self.weight = parameter(values)
        empty = torch.empty(0, dtype=dtype, device=device)
        self.bias = torch.nn.Parameter(empty.new_zeros(self.out_features)) if self.use_bias else empty

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        inside = self.bias if self.use_bias and not self.return_bias else None
        out = self._multiply(inp, self.weight, inside, "weight", is_first_microbatch)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    """The norm's parameter comes first, in the layer behind it."""

    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", **kwargs) -> None:
        assert normalization == "RMSNorm"
        self.eps = eps
        super().__init__(in_features, out_features, **kwargs)

    def _parameters_of(self, dtype, device) -> None:
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(self.in_features, dtype=dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        super()._parameters_of(dtype, device)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        normed = torch.nn.functional.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class RMSNorm(torch.nn.RMSNorm):
    """Its size has two names: Megatron-Core 0.16 gives `hidden_size`, later ones `normalized_shape`."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=False,
        params_dtype=None,
        hidden_size=None,
        device=None,
        **_,
    ) -> None:
        super().__init__(
            hidden_size if normalized_shape is None else normalized_shape, eps=eps, dtype=params_dtype, device=device
        )
        self.weight.sequence_parallel = sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """Named by Megatron-Core; no family that is supported has it."""

    def __init__(self, normalized_shape=None, eps=1e-5, hidden_size=None, **_) -> None:
        super().__init__(hidden_size if normalized_shape is None else normalized_shape, eps=eps)


class GroupedLinear(_Base):
    """Experts' layers: one weight each, `weight0`, `weight1`, ..."""

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        bias=True,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        **_,
    ) -> None:
        super().__init__(tp_group, tp_size, sequence_parallel, fuse_wgrad_accumulation)
        assert not bias
        self.num_gemms, self.return_bias, self.use_bias = num_gemms, False, False
        shape = out_features // (tp_size if parallel_mode == "column" else 1), in_features
        shape = shape if parallel_mode != "row" else (out_features, in_features // tp_size)
        for number in range(num_gemms):
            values = torch.empty(shape, dtype=params_dtype, device=device).fill_(0.5)
            setattr(self, f"weight{number}", parameter(values))

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        outs = []
        for number, part in enumerate(inp.split(list(m_splits))):
            name = f"weight{number}"
            outs.append(self._multiply(part, getattr(self, name), None, name, is_first_microbatch))
        return torch.cat(outs)


class DotProductAttention(torch.nn.Module):
    """Causal attention over packed (THD) sequences."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        tp_size=1,
        softmax_scale=None,
        **_,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        attn_mask_type=None,
        **_,
    ) -> Tensor:
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and query_layer.dim() == 3
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max(lengths) and sum(lengths) == len(query_layer)
        groups = query_layer.shape[1] // key_layer.shape[1]
        outs = []
        for q, k, v in zip(query_layer.split(lengths), key_layer.split(lengths), value_layer.split(lengths)):
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)
