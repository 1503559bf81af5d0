"""One run through the command line: killed, asked to stop, started again; against one that was left alone.

The runs that are disturbed have no end in sight, so the disturbance never comes too late, however slow this process is.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from tests.distributed import LIMIT_S
from tests.tiny_run import TinyRun, kill

ENDLESS = "train.steps=1000000"


def wait_for_step(run: TinyRun, process, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while run.steps_logged() < step:
        assert process.poll() is None and time.monotonic() < deadline, run.output()
        time.sleep(0.02)


def test_killed_and_stopped_and_started_again(tmp_path: Path) -> None:
    rollout = {"carry_over": "finished", "oversubscribe": 2.0}
    run = TinyRun(tmp_path, train={"lr_schedule": "constant"}, rollout=rollout, checkpoint={"every": 3})
    process = run.start(ENDLESS)
    wait_for_step(run, process, random.SystemRandom().randint(3, 6))
    kill(process)

    process = run.start(ENDLESS)
    wait_for_step(run, process, 8)
    process.send_signal(signal.SIGTERM)  # to the launcher, as Slurm's and a user's kill do
    assert run.wait(process) == 75, run.output()
    assert "SIGTERM" in run.output() and "start again to go on" in run.output()

    last = f"train.steps={run.steps_logged() + 4}"
    assert run.train(last) == 0, run.output()
    assert "resumed at step" in run.output()

    left_alone = tmp_path / "left_alone"
    assert run.train(last, f"run_dir={left_alone}") == 0, run.output()
    assert run.metrics() == run.metrics(left_alone)
