"""One answer of 32k tokens trains in bounded memory: no [S, S] mask, no second copy of the logits."""

from __future__ import annotations

import resource

import torch

from megatron_opd.config import parse_config
from megatron_opd.prune.signals import make_signal
from megatron_opd.scoring.prune_weights import assign_prune_weights
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.until_spent import score_until_spent
from megatron_opd.training.clock import PhaseClock
from megatron_opd.training.setup import Trainer, build_optimizer, build_scheduler, wrap_ddp
from megatron_opd.training.step import TrainingStep
from megatron_opd.types import Prompt, Rollout
from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, student_model, teacher_model
from tests.models.tiny_families import make

TOKENS = 32768
LIMIT = 3 * 2**30  # bytes a rank, interpreter and libraries included
VOCAB = 4096
K = 8


def long_step(rank: int, world: int, student_dir: str, teacher_dir: str):
    config = parse_config(
        {
            "student": {"model": student_dir, "precision": "fp32", "parallel": LAYOUTS["tp2_sp"]},
            "teacher": {"model": teacher_dir, "precision": "fp32", "parallel": LAYOUTS["tp2_sp"]},
            "prune": {"k": K, "cut": "reliability", "w_base": 0.0, "threshold": 0.0, "w_drop": 0.01},
            "data": {"prompts": "none.jsonl"},
        }
    )
    with student_model(student_dir, "tp2_sp") as student:
        teacher = teacher_model(teacher_dir, "tp2_sp")
        ddp = wrap_ddp(student, config.train)
        optimizer = build_optimizer(student, ddp, config.train)
        step = TrainingStep(
            Trainer(student, {"teacher": teacher}, ddp, optimizer, build_scheduler(optimizer, config.train)), config
        )
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB, (TOKENS,), generator=generator)
        ids = torch.arange(K).repeat(TOKENS, 1)
        answer = Rollout(
            Prompt(0, "", [1, 2]), 0, tokens, torch.zeros(TOKENS), ids, torch.zeros(TOKENS, K), "length", 0
        )
        signal = make_signal(config.prune)
        pieces = score_until_spent(teacher, [answer], signal, config.prune, 16384, PhaseClock())
        scores = score_rollouts(teacher, [answer], signal, 16384)
        same = float((pieces[0].logprobs - scores[0].logprobs).abs().max())
        batch = assign_prune_weights([answer], scores, config.prune, signal)
        result = step(batch)
    return result.applied, batch.kept_length, same, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_32k_answer_trains_in_3_gb_a_rank(tmp_path):
    shape = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2 * TOKENS,
    }
    directories = [str(make("qwen3", tmp_path / name, **shape)) for name in ("student", "teacher")]
    for applied, kept, same, memory in run_distributed(2, long_step, *directories, fresh=True):
        assert applied and kept == [TOKENS]
        assert same < 1e-4  # read in doubling pieces or at once
        assert memory < LIMIT, f"{memory / 2**30:.2f} GiB"
