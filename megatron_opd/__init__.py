"""On-policy distillation at Megatron scale, with Prune-OPD."""

__version__ = "0.1.0"
