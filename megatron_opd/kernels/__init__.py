"""Kernels at the speed of memory: Triton on a GPU, torch elsewhere and as their reference. torch alone is needed.

`loss.kernels` of the config chooses, through `set_kernels`; Triton is imported when the first kernel runs.
"""

from megatron_opd.kernels.backend import kernel_backend, set_kernels
from megatron_opd.kernels.backward import topk_loss_backward_
from megatron_opd.kernels.chunks import compute_dtype, full_precision_chunks
from megatron_opd.kernels.combine import combine_log_sum_exp, finished_logprobs
from megatron_opd.kernels.head import fused_head_loss
from megatron_opd.kernels.shard import VocabShard, vocab_shard
from megatron_opd.kernels.stats import ShardStats, local_topk, shard_stats

__all__ = [
    "ShardStats",
    "VocabShard",
    "combine_log_sum_exp",
    "compute_dtype",
    "finished_logprobs",
    "full_precision_chunks",
    "fused_head_loss",
    "kernel_backend",
    "local_topk",
    "set_kernels",
    "shard_stats",
    "topk_loss_backward_",
    "vocab_shard",
]
