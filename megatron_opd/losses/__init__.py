"""Distillation losses on vocab-parallel logits; torch only."""

from megatron_opd.kernels import VocabShard, vocab_shard
from megatron_opd.losses.base import DistillTargets, LogprobLoss, Loss, LossOptions, constant_terms
from megatron_opd.losses.candidates import candidate_terms, topk_reverse_kl
from megatron_opd.losses.head import head_loss
from megatron_opd.losses.rebuilt import rebuilt_loss
from megatron_opd.losses.registry import get_loss
from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.losses.vocab_parallel import student_logprobs, vocab_parallel_logprobs
from megatron_opd.plugins import LOSSES

__all__ = [
    "LOSSES",
    "DistillTargets",
    "LogprobLoss",
    "Loss",
    "LossOptions",
    "VocabShard",
    "candidate_terms",
    "constant_terms",
    "get_loss",
    "head_loss",
    "rebuilt_loss",
    "student_logprobs",
    "topk_reverse_kl",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
    "vocab_shard",
]
