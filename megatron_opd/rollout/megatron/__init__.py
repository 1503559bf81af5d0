"""Generation by the training ranks themselves."""

from megatron_opd.rollout.megatron.engine import MegatronEngine, _Batch

__all__ = ["MegatronEngine", "_Batch"]
