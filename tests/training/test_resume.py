"""Runs that are interrupted, lose checkpoints or cannot save, against one run that none of this happens to."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny_run import CONFIG, Case, Outcome, TinyRun, run_cases

STEPS = 5


def send(to_rank: int, at_step: int, number: int, rank: int, step: int) -> None:
    if (rank, step) == (to_rank, at_step):
        os.kill(os.getpid(), number)


def limit_files(first: int, last: int, rank: int, step: int) -> None:
    """From step `first` to step `last` rank 1 cannot make a file of more than 5 kB: an OSError, as on a full disk."""
    if rank == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if first <= step <= last else hard, hard))


def save_while_training(first: int, last: int, rank: int, step: int) -> None:
    """A save in the background has until the end of the next step, however slow the disk; those of the steps `first` to
    `last` meet a full one."""
    from megatron_opd.checkpoint.checkpointer import Checkpointer

    plain = getattr(Checkpointer.after_step, "__wrapped__", Checkpointer.after_step)

    @functools.wraps(plain)
    def after_step(self: Checkpointer, step: int, *arguments: Any, **named: Any) -> None:
        self._advance(wait=True)
        limit_files(first, last, rank, step)
        plain(self, step, *arguments, **named)

    Checkpointer.after_step = after_step  # type: ignore[method-assign]


def spoil_batch(first: int, last: int, rank: int, step: int) -> None:
    """From step `first` to step `last` a prune weight is not a number."""
    from megatron_opd.training import loop

    plain = loop.assign_prune_weights

    def assign(*arguments: Any) -> Any:
        loop.assign_prune_weights = plain
        batch = plain(*arguments)
        batch.prune_weight[1][:] = float("nan")
        return batch

    if first <= step <= last:
        loop.assign_prune_weights = assign


def damage(run_dir: Path) -> None:
    """Beside a complete checkpoint of step 2: one cut short, one without marker, two scrambled, one empty."""
    root = run_dir / "checkpoints"
    for step in (3, 4, 5, 8):
        shutil.copytree(root / "step_000002", root / f"step_{step:06d}")
    (root / "step_000003/megatron_opd.json").unlink()
    for part in ("step_000004/optimizer/.metadata", "step_000008/optimizer/__1_0.distcp"):
        scrambled = root / part
        scrambled.write_bytes(b"\0" * scrambled.stat().st_size)
    cut = root / "step_000005/megatron/__1_0.distcp"
    cut.write_bytes(cut.read_bytes()[:-100])
    (root / "step_000006").mkdir()
    (root / ".step_000007.partial/megatron").mkdir(parents=True)


def empty_checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints/step_000002").mkdir(parents=True)


def lock_of_another_job(run_dir: Path) -> None:
    """The lock of this test's parent process, which is alive."""
    from megatron_opd.runtime.lock import RunLock, _started

    lock = RunLock(run_dir)
    owner = lock.identity | {"job": "4711", "pid": os.getppid(), "process_started": _started(os.getppid())}
    lock.path.write_text(json.dumps(owner))


EVALUATED = (
    "eval.every=2",
    "eval.sets=[{name: sums, prompts: FOLDER/prompts.jsonl, verifier: exact, max_tokens: 4, limit: 3}]",
)
CASES = [
    Case("plain"),
    Case("signalled", before_step=partial(send, 1, 3, signal.SIGUSR1)),
    Case("signalled"),
    Case("evaluated", EVALUATED),
    Case("evaluated_later", EVALUATED, before_step=partial(send, 1, 4, signal.SIGUSR1)),
    Case("evaluated_later", EVALUATED, before_step=partial(send, 0, STEPS, signal.SIGTERM)),
    Case("evaluated_later", EVALUATED),
    Case("evaluated_later", EVALUATED),
    Case("smaller_budget", ("prune.budget.maximum=12", "prune.budget.patience=2"), resumes=("plain", 2)),
    Case("no_signal", ("prune.preset=off",), resumes=("plain", 2)),
    Case("damaged", resumes=("plain", 2), prepare=damage),
    Case("only_damaged", prepare=empty_checkpoint),
    Case("never", ("checkpoint.resume=never",), resumes=("plain", 2)),
    Case("other_model", ("student.model=FOLDER/teacher",), resumes=("plain", 2)),
    Case("locked", prepare=lock_of_another_job),
    Case("kept", ("checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2")),
    Case("full_for_a_while", before_step=partial(limit_files, 2, 3)),
    Case("full", ("checkpoint.max_failures=2",), before_step=partial(limit_files, 3, STEPS)),
    Case("full", before_step=partial(limit_files, 0, 0)),
    Case(
        "asynchronous",
        ("checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.keep_last=9"),
        before_step=partial(save_while_training, 0, 0),
    ),
    Case("from_asynchronous", resumes=("asynchronous", 3)),
    Case(
        "asynchronous_full",
        ("checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.max_failures=9"),
        before_step=partial(save_while_training, 2, 3),
    ),
    Case("nan_once", before_step=partial(spoil_batch, 3, 3)),
    Case("nan", ("train.max_bad_steps=2",), before_step=partial(spoil_batch, 2, STEPS)),
]


class Finished:
    """All cases have run; outcomes by name, in the order of their runs."""

    def __init__(self, run: TinyRun) -> None:
        self.run = run
        by_rank = run_distributed(2, run_cases, run.folder, CASES, fresh=True)
        self.outcomes: dict[str, list[Outcome]] = {}
        for number, case in enumerate(CASES):
            first, second = (outcomes[number] for outcomes in by_rank)
            assert (first.error, first.exit_code) == (second.error, second.exit_code)  # one rank's end is everybody's
            self.outcomes.setdefault(case.name, []).append(first)

    def only(self, name: str) -> Outcome:
        (outcome,) = self.outcomes[name]
        return outcome

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = self.run.metrics(self.run.folder / name)
        return [{k: v for k, v in line.items() if k != "warning"} for line in lines]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.run.folder / name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run = TinyRun(tmp_path_factory.mktemp("resume"), train={"steps": STEPS}, checkpoint={"keep_last": 3})
    return Finished(run)


def test_an_undisturbed_run(finished: Finished) -> None:
    assert finished.only("plain").error == ""
    assert [m["step"] for m in finished.metrics("plain")] == [1, 2, 3, 4, 5]
    assert finished.checkpoints("plain") == ["step_000002", "step_000004", "step_000005"]


def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on(finished: Finished) -> None:
    first, second = finished.outcomes["signalled"]
    assert first.exit_code == 75 and "SIGUSR1: step 3 is finished and saved" in first.error
    assert second.error == "" and "resumed at step 3" in second.said
    assert finished.metrics("signalled") == finished.metrics("plain")


def test_a_signal_is_not_kept_waiting_by_an_evaluation(finished: Finished) -> None:
    """The step is saved, and its evaluation is made up for after the restart, also the last step's."""
    before, at_the_end, made_up, nothing_left = finished.outcomes["evaluated_later"]
    assert before.exit_code == at_the_end.exit_code == 75
    assert "eval sums" not in before.said.partition("step 3/5")[2]
    assert "resumed at step 4" in at_the_end.said and "step 4  eval sums" in at_the_end.said
    assert made_up.error == nothing_left.error == ""
    assert "step 5  eval sums" in made_up.said and "eval" not in nothing_left.said
    lines = finished.metrics("evaluated")
    assert [m["step"] for m in lines if "accuracy" in m] == [2, 4, 5]
    assert finished.metrics("evaluated_later") == lines


def test_the_configs_budget_wins_over_the_checkpoints(finished: Finished) -> None:
    assert finished.only("smaller_budget").error == "" == finished.only("no_signal").error
    assert "prune.budget has changed since the checkpoint: maximum" in finished.only("smaller_budget").said
    assert max(m["budget"] for m in finished.metrics("smaller_budget")[2:]) <= 12
    assert max(m["budget"] for m in finished.metrics("plain")[2:]) > 12
    unwatched = finished.metrics("no_signal")[2:]
    assert {m["budget"] for m in unwatched} == {CONFIG["prune"]["budget"]["maximum"]}


def test_damaged_checkpoints_are_named_and_skipped(finished: Finished) -> None:
    outcome = finished.only("damaged")
    said = "".join(outcome.said.split("\n"))
    assert outcome.error == "" and "resumed at step 2" in said
    for words in (
        "step_000008: optimizer/ cannot be loaded: ",
        "step_000006: the directory is empty",
        "step_000005: megatron/__1_0.distcp has",
        "step_000004: ",
        "step_000003: megatron_opd.json is missing",
        "removed what an interrupted save had left: .step_000007.partial",
    ):
        assert words in said
    assert finished.metrics("damaged") == finished.metrics("plain")


def test_never_starts_over_in_silence(finished: Finished) -> None:
    outcome = finished.only("only_damaged")
    assert outcome.error.startswith("CheckpointError") and outcome.exit_code == 3
    assert "step_000002: the directory is empty" in outcome.error
    outcome = finished.only("never")
    assert outcome.error.startswith("CheckpointError") and "checkpoint.resume is never" in outcome.error


def test_refuses_another_model(finished: Finished) -> None:
    outcome = finished.only("other_model")
    assert outcome.error.startswith("CheckpointError") and "hidden_size 32 there, 48 here" in outcome.error


def test_one_job_per_run_directory(finished: Finished) -> None:
    outcome = finished.only("locked")
    assert outcome.error.startswith("RunLocked") and "Slurm job 4711" in outcome.error and outcome.exit_code == 3


def test_old_checkpoints_go(finished: Finished) -> None:
    assert finished.checkpoints("kept") == ["step_000002", "step_000004", "step_000005"]


def test_a_full_disk_for_a_while(finished: Finished) -> None:
    outcome = finished.only("full_for_a_while")
    assert outcome.error == "" and finished.metrics("full_for_a_while") == finished.metrics("plain")
    lines = finished.run.metrics(finished.run.folder / "full_for_a_while")
    assert [m["step"] for m in lines if "warning" in m] == [3, 4]
    assert "SAVING FAILS (2 in a row, no checkpoint yet): File too large" in lines[3]["warning"]
    assert finished.checkpoints("full_for_a_while") == ["step_000004", "step_000005"]


def test_a_disk_that_stays_full(finished: Finished) -> None:
    first, second = finished.outcomes["full"]
    assert first.error.startswith("CheckpointError: 2 saves in a row failed") and "File too large" in first.error
    assert "step 2 is untouched" in first.error
    assert second.error == "" and "resumed at step 2" in second.said
    assert finished.metrics("full") == finished.metrics("plain")


def test_asynchronous_saves(finished: Finished) -> None:
    """What is written while training goes on is the state at its step."""
    for name in ("asynchronous", "from_asynchronous", "asynchronous_full"):
        assert finished.only(name).error == ""
        assert finished.metrics(name) == finished.metrics("plain")
    assert finished.checkpoints("asynchronous") == [f"step_{step:06d}" for step in range(1, STEPS + 1)]
    assert "resumed at step 3" in finished.only("from_asynchronous").said
    assert "checkpoint of step 2 failed: File too large" in finished.only("asynchronous_full").said
    assert finished.checkpoints("asynchronous_full")[-1] == "step_000005"


def test_a_step_with_nan_is_skipped_and_kept(finished: Finished) -> None:
    assert finished.only("nan_once").error == ""
    lines = finished.metrics("nan_once")
    assert lines[2]["skipped"] == "loss is nan" and [m["skipped_steps"] for m in lines] == [0, 0, 1, 1, 1]
    assert lines[3]["lr"] == lines[2]["lr"]  # the schedule waits for a step that is applied
    kept = torch.load(finished.run.folder / "nan_once/bad_steps/step_000003.pt", weights_only=True)
    assert kept["reason"] == "loss is nan" and len(kept["responses"]) == 4
    assert kept["responses"][1]["prune_weight"].isnan().all() and not kept["responses"][0]["prune_weight"].isnan().any()


def test_many_steps_with_nan_end_the_run(finished: Finished) -> None:
    outcome = finished.only("nan")
    assert outcome.error.startswith("TrainingStopped: 2 steps in a row") and outcome.exit_code == 3
    assert len(finished.metrics("nan")) == 3
