"""An engine that gives its memory back while it sleeps, as vLLM's does on a GPU, is never used asleep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases

ALONE = ("student.parallel={}", "teacher.parallel={}")
EVALUATED = (
    "eval.every=1",
    "eval.at_start=true",
    "eval.sets=[{name: sums, prompts: FOLDER/prompts.jsonl, verifier: exact, max_tokens: 4, limit: 2}]",
)
CASES = [Case("paper", (*ALONE, *EVALUATED)), Case("in_flight", (*ALONE, *EVALUATED, "prune.preset=in_flight"))]


def train(rank: int, world: int, folder: Path) -> Any:
    from megatron_opd.rollout.megatron.engine import MegatronEngine
    from megatron_opd.training import run

    done: list[str] = []

    class Engine(MegatronEngine):
        asleep = False

        def wake(self) -> None:
            done.append("wake")
            self.asleep = False

        def sleep(self) -> None:
            done.append("sleep")
            self.asleep = True

        def update_parameters(self, *arguments: Any) -> None:
            assert not self.asleep
            done.append("update")
            super().update_parameters(*arguments)

        def generate(self, *arguments: Any, **keywords: Any) -> Any:
            assert not self.asleep
            done.append("generate")
            return super().generate(*arguments, **keywords)

    run.make_engine = lambda config, student, eos_ids: Engine(student, eos_ids, config.rollout.max_batch)
    return run_cases(rank, world, folder, CASES), done


def test_the_engine_is_awake_whenever_it_is_used(tmp_path):
    run = TinyRun(tmp_path, train={"steps": 2, "warmup_steps": 0}, checkpoint={"every": 0})
    outcomes, done = run_distributed(1, train, run.folder, fresh=True)[0]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    each = ["wake", "update", "generate", *2 * ["wake", "generate", "sleep", "wake", "update", "generate"]]
    assert done == 2 * each
