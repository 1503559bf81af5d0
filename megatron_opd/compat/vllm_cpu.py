"""What vLLM's CPU build keeps in a packed form, which a reload of parameters does not pack again by itself.

On GPUs there is nothing to do: there vLLM writes new values where its kernels read them.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Before a reload: makes vLLM set its experts up as for the first time.

    It packs (and pads) expert tensors only when it makes a layer's kernel and later copies new values in unpacked,
    which is right where the two forms are the same.
    """
    if torch.accelerator.is_available():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, FusedMoEMethodBase):
            method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """After a reload: where the embedding is tied to the output layer, a reload changes the embedding alone and the
    head's packed copy would go on with the old values."""
    if torch.accelerator.is_available():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
