"""A stand-in for Transformer Engine on a CPU, for tests alone.

The real one needs a GPU even to multiply in bf16. This one has its names, its parameters' names and order, its demands
on shapes in FP8 and its caches, in plain torch, so that Megatron-Core's real Transformer Engine layers can be built,
loaded, trained and generated with on a CPU. FP8 is values rounded to e4m3, one scale a tensor; gradients are exact.
Modelled on the behaviour of version 2.11.0; `tests/gpu/` runs the same checks with the real one.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
