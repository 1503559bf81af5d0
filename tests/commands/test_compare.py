"""`megatron-opd compare`: runs in turns are the runs that `train` makes, one by one."""

import subprocess
import sys

import pytest

from tests.distributed import LIMIT_S
from tests.tiny_run import TinyRun, child_environment

RUNS = {"plain": ("prune.preset=off",), "pruned": ("prune.preset=paper", "train.lr=2e-3")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("compare"))


def _compare(tiny, *arguments):
    command = [sys.executable, "-m", "megatron_opd.cli", "compare", str(tiny.config), "--nproc", "2", *arguments]
    environment = child_environment()
    return subprocess.run(command, cwd=tiny.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def test_runs_in_turns_are_those_of_train(tiny):
    together = [part for name, own in RUNS.items() for part in ("--variant", name, *own)]
    done = _compare(tiny, "train.steps=3", "checkpoint.every=0", *together)
    assert done.returncode == 0, done.stdout + done.stderr
    turns = [line.split("/")[0] for line in done.stdout.splitlines() if ": step " in line]
    assert turns == [f"{name}: step {n}" for n in (1, 2, 3) for name in RUNS], done.stdout
    for name, own in RUNS.items():
        alone = tiny.folder / f"{name}-alone"
        assert tiny.train("train.steps=3", "checkpoint.every=0", f"run_dir={alone}", *own) == 0, tiny.output()
        assert tiny.metrics(tiny.run_dir / name) == tiny.metrics(alone)


def test_names_that_are_not_names_are_refused(tiny):
    done = _compare(tiny, "--variant", "prune.preset=off", "--variant", "b", "prune.preset=paper")
    assert done.returncode == 2
    assert "--variant prune.preset=off" in done.stderr
    done = _compare(tiny, "--variant", "a", "--variant", "a")
    assert done.returncode == 2 and "--variant a" in done.stderr
