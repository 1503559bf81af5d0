"""Distillation losses on vocab-parallel logits; torch only."""

from megatron_opd.losses.candidates import candidate_terms, sampled_reverse_kl, student_logprobs, topk_reverse_kl
from megatron_opd.losses.full_vocabulary import full_vocabulary_loss
from megatron_opd.losses.head import FUSED_KINDS, head_loss
from megatron_opd.losses.registry import LOSSES, DistillTargets, Loss, get_loss, global_token_count
from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.losses.vocab_parallel import vocab_parallel_logprobs

__all__ = [
    "FUSED_KINDS",
    "LOSSES",
    "DistillTargets",
    "Loss",
    "candidate_terms",
    "full_vocabulary_loss",
    "get_loss",
    "global_token_count",
    "head_loss",
    "sampled_reverse_kl",
    "student_logprobs",
    "topk_reverse_kl",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
]
