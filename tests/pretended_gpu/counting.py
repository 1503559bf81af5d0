"""What one more decode step, micro-batch, row and response of a run costs in waits and copies, on pretended GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.pretended_gpu.device import SEEN
from tests.pretended_gpu.machine import pretended_gpus

Counts = dict[str, float]


def counts(rank: int, world: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Per decode step, training micro-batch, row that the teacher scores, and response in such a row."""
    with pretended_gpus():
        from megatron_opd.config import load_config
        from megatron_opd.rollout.base import Request, Sampling
        from megatron_opd.scoring.prune_weights import assign_prune_weights
        from megatron_opd.scoring.separate import score_rollouts
        from megatron_opd.training.microbatch import build_microbatch
        from megatron_opd.training.run import Run
        from megatron_opd.types import Prompt

        run = Run(load_config(folder / "config.yaml", [f"run_dir={folder / 'counted'}", *overrides]))
        engine, student, teacher = run.engine, run.trainer.student, run.trainer.teacher
        engine.eos = engine.eos[:0]  # nothing ends early
        requests = [Request(Prompt(i, "", [5, 6, 7]), i) for i in range(8)]

        def generate(tokens: int, responses: int = 4) -> Any:
            return engine.generate(requests[:responses], Sampling(tokens, top_logprobs=8, seed=3))

        few, many = _seen(lambda: generate(8)), _seen(lambda: generate(24))
        found = {"decode step": _per(many, few, 16)}
        rollouts = generate(8, 8)
        batch_of = lambda n: score_rollouts(teacher, rollouts[:n], run.scoring.signal, 1)  # noqa: E731 -- a row each
        row_of = lambda n: score_rollouts(teacher, rollouts[:n], run.scoring.signal, 10_000)  # noqa: E731
        batch_of(8)  # what is remembered from call to call is made
        found["scored row"] = _per(_seen(lambda: batch_of(8)), _seen(lambda: batch_of(4)), 4 * teacher.layout.replicas)
        found["response in a scored row"] = _per(_seen(lambda: row_of(8)), _seen(lambda: row_of(4)), 4)
        batch = assign_prune_weights(rollouts, row_of(8), run.config.prune, run.scoring.signal)
        found["micro-batch built"] = _per(_seen(lambda: build_microbatch(student, batch, (0, 1))), Counter(), 1)
        trained = run.training_step

        def train(tokens: int) -> None:
            trained.config = trained.config.model_copy(deep=True)
            trained.config.train.tokens_per_microbatch = tokens
            trained(batch)

        one, eight = _seen(lambda: train(10_000)), _seen(lambda: train(1))
        found["micro-batch trained on"] = _per(eight, one, 7)
        run.close()
        return found


def _seen(act: Callable[[], object]) -> Counter[str]:
    SEEN.clear()
    act()
    return Counter({f"{kind} {place}": n for kind, places in SEEN.places().items() for place, n in places.items()})


def _per(more: Counter[str], less: Counter[str], units: int) -> dict[str, Any]:
    """The difference by kind, per unit; and where it arises."""
    totals: dict[str, Any] = {}
    for key in more:
        if change := (more[key] - less[key]) / units:
            kind = key.split(" ", 1)[0]
            totals[kind] = totals.get(kind, 0) + change
            totals.setdefault("places", {})[key] = change
    return totals
