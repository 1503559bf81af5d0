"""On-policy distillation at Megatron scale, with Prune-OPD."""
