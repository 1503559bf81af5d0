"""FP8 parameters: of a nominal dtype of bf16, with values of e4m3 that share a scale."""

from __future__ import annotations

from types import MethodType

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, rounded


class QuantizedTensor(torch.Tensor):
    """Writing into a part of it loses what is written, as with the real ones whose parts are copies or share scales."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            target, source = args[0].as_subclass(torch.Tensor), args[1].as_subclass(torch.Tensor)
            target.copy_(rounded(source.to(target.device, target.dtype), None))
            return args[0]
        if function in (torch.Tensor.__getitem__, torch.Tensor.split, torch.Tensor.view, torch.Tensor.narrow):
            return function(args[0].as_subclass(torch.Tensor).detach().clone(), *args[1:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).detach().clone()


def parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of a module that is being made, in FP8 where the context says so."""
    if not FP8GlobalStateManager.parameters:
        return torch.nn.Parameter(values)
    made = torch.nn.Parameter(rounded(values, None).as_subclass(QuantizedTensor))
    if FP8GlobalStateManager.keep_initial:
        made.initial = values.clone()
        made.get_high_precision_init_val = MethodType(lambda self: self.initial, made)
        made.clear_high_precision_init_val = MethodType(lambda self: setattr(self, "initial", None), made)
    return made
