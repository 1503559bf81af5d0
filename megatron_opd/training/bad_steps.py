"""A step that was skipped, on disk, for a person to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_opd.files import new_file
from megatron_opd.types import ScoredBatch


def dump_bad_step(run_dir: str, step: int, reason: str, batch: ScoredBatch) -> Path:
    """Writes RUN/bad_steps/step_N.pt; `torch.load` reads it with weights_only=True. Raises OSError.

    A dict of the reason, the loss's denominator, and per response the prompt, the rollout, the teacher's scores and the
    prune weights, as in `types.py`.
    """
    responses: list[dict[str, Any]] = []
    for number, (rollout, scores) in enumerate(zip(batch.rollouts, batch.scores, strict=True)):
        responses.append(
            {
                "prompt_uid": rollout.prompt.uid,
                "prompt": rollout.prompt.text,
                "prompt_tokens": list(rollout.prompt.tokens),
                "tokens": rollout.tokens,
                "logprobs": rollout.logprobs,
                "topk_ids": rollout.topk_ids,
                "topk_logprobs": rollout.topk_logprobs,
                "end_reason": rollout.end_reason,
                "policy_version": rollout.policy_version,
                "teacher_logprobs": scores.logprobs,
                "teacher_sampled_logprobs": scores.sampled_logprobs,
                "measured": scores.measured,
                "signal_columns": scores.columns,
                "prune_weight": batch.prune_weight[number],
                "kept_length": batch.kept_length[number],
                "effective_length": batch.effective_length[number],
                "events": batch.events[number],
            }
        )
    path = Path(run_dir, "bad_steps", f"step_{step:06d}.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"step": step, "reason": reason, "response_tokens": batch.response_tokens, "responses": responses},
        new_file(path),
    )
    return path
