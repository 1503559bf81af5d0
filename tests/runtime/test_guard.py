"""The run directory's lock, and what a hung step leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_opd.records.reading import STALE_S
from megatron_opd.runtime.launch import agreed_exit_code
from megatron_opd.runtime.lock import RunLock, RunLocked
from tests.tiny_run import child_environment

# One rank hangs in its step, the other waits for it. The guard's clock stands still until both are seen there, then
# passes the limit at once; no rank ends before both have written. So nothing depends on how fast this machine is.
HANG = """
import sys, threading, time, types
from pathlib import Path
import torch.distributed as dist
from megatron_opd.runtime import guard

def stuck():
    time.sleep(1000)

def everywhere(said):
    (folder / f"{said}-{dist.get_rank()}").touch()
    while len(list(folder.glob(f"{said}-*"))) < 2:
        time.sleep(0.05)

def in_the_hang():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code.co_name not in ("stuck", "barrier"):
        frame = frame.f_back
    return frame is not None

def clock():
    global now
    if now == 0.0 and in_the_hang():
        everywhere("hung")
        now = 601.0
    return now

if __name__ == "__main__":
    folder, now = Path(sys.argv[1]), 0.0
    guard.time = types.SimpleNamespace(monotonic=clock, sleep=lambda seconds: everywhere("written"))
    dist.init_process_group("gloo")
    running = guard.Guard(str(folder / "run"), limit_s=600.0)
    with running.step(7):
        stuck() if dist.get_rank() == 1 else dist.barrier()
"""


def owner_of(run_dir: Path, **changes: object) -> RunLock:
    """A lock as another process would have left it."""
    lock = RunLock(run_dir)
    lock.path.write_text(json.dumps(lock.identity | {"token": "other"} | changes))
    return lock


def test_a_living_owner_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    first = RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(RunLocked, match=rf"Slurm job 17 \(host node3, process {os.getpid()}"):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_on_this_machine_loses_it(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    owner_of(tmp_path, pid=child.pid)
    assert f"process {child.pid}" in RunLock(tmp_path).taken_from


def test_a_requeued_job_takes_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    owner_of(tmp_path, boot="another machine", restart="0")
    with pytest.raises(RunLocked):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "job 17 has been requeued" in RunLock(tmp_path).taken_from


def test_another_machine_counts_as_dead_without_heartbeat(tmp_path: Path) -> None:
    lock = owner_of(tmp_path, boot="another machine")
    past = time.time() - STALE_S + 60
    os.utime(lock.path, (past, past))
    with pytest.raises(RunLocked):
        RunLock(tmp_path)
    os.utime(lock.path, (past - 120, past - 120))
    new = RunLock(tmp_path)
    assert "no heartbeat" in new.taken_from
    lock.beat()  # the old owner was only slow: it notices, and does not take the directory back
    assert lock.lost and not new.lost
    lock.release()
    new.beat()
    assert new.path.exists() and not new.lost


def test_a_hung_step_ends_with_every_ranks_stack(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    start = "import sys; from megatron_opd.runtime.launch import torchrun; sys.exit(torchrun(sys.argv[1:]))"
    arguments = ["--standalone", "--nproc-per-node=2", str(tmp_path / "hang.py"), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", start, *arguments], env=child_environment(), capture_output=True, text=True
    )
    assert ended.returncode == 76, ended.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2" in ended.stderr
    assert "step 7 has taken more than train.watchdog_s: 600.0 s" in ended.stderr
    assert "in stuck" in ended.stderr and "in barrier" in ended.stderr
    assert re.search(r"launch: \d\d:\d\d:\d\d rank [01] ended by exit code 76: a step hung", ended.stderr)


@pytest.mark.parametrize(
    ("codes", "first", "asked", "expected"),
    [
        ([75, 75], 75, False, 75),
        ([75, -15], 75, False, 75),
        ([-10, -10], -10, True, 75),  # asked to stop before the ranks had begun to listen
        ([-10, -10], -10, False, 1),
        ([2, -15], 2, True, 2),
        ([-9, -15], -9, False, 1),
        ([76, 1], 76, False, 76),
    ],
)
def test_one_exit_code_for_all_ranks(codes: list[int], first: int, asked: bool, expected: int) -> None:
    assert agreed_exit_code(codes, first, asked) == expected
