"""A fault campaign: one long tiny run, random faults, and at the end the curve of a run that nothing happened to.

    python tests/slurm/campaign.py --minutes 30 [--seed 0] [--cluster DIR] [--out report.json]

Starts the cluster of cluster.sh (or takes the one in DIR), submits slurm/train_qwen3.sh once, and injects faults until
the time is over. Then it stops the run, trains as many steps without any fault on this machine, and compares every
number but times. Exit code 1 if the curves differ, or if a recovery lost more than the checkpoint interval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.slurm.harness import LIMIT_S, Cluster, Job, NoCluster, metrics, wait_until  # noqa: E402
from tests.tiny_run import TinyRun  # noqa: E402

EVERY = 2  # steps between checkpoints, as in TinyRun's config
KEPT = 2  # checkpoint.keep_last


@dataclass
class Fault:
    """One fault and what became of it. `lost`: finished steps that were run again; None where nothing restarted."""

    kind: str
    at_step: int
    lost: int | None
    allowed: int
    seconds: float


class Campaign:
    def __init__(self, cluster: Cluster, folder: Path, seed: int) -> None:
        self.cluster, self.folder, self.random = cluster, folder, random.Random(seed)
        self.seen = 0  # finished steps when the last fault came
        folder.mkdir()
        self.tiny = TinyRun(folder)
        self.run_dir = folder / "campaign"
        self.store = cluster.small / f"campaign-{folder.name}"  # checkpoints lie on the small file system
        self.store.mkdir()
        self.run_dir.mkdir()
        (self.run_dir / "checkpoints").symlink_to(self.store)
        self.faults: list[Fault] = []
        self.kinds: dict[str, Callable[[], int | None]] = {
            "scontrol requeue": self.requeue,
            "time limit notice": self.notice,
            "kill -9 of a node's ranks": self.kill,
            "hanging rank": self.hang,
            "lost link": self.lose_link,
            "newest checkpoint truncated": self.truncate,
            "newest checkpoint emptied": self.empty,
            "second job on the run directory": self.second_job,
            "disk full": self.fill_disk,
        }
        self.job = self.submit()

    def submit(self) -> Job:
        return self.cluster.submit(
            self.run_dir,
            self.tiny.config,
            "train.steps=100000",
            "train.watchdog_s=12",
            "checkpoint.max_failures=1000",
            MAX_FAILURES="50",
            EXIT_GRACE_S="5",
        )

    def run(self, seconds: float, only: list[str]) -> None:
        """Faults until the time is over, each kind once before any comes again."""
        deadline, waiting = time.monotonic() + seconds, []
        while time.monotonic() < deadline:
            if not waiting:
                waiting = self.random.sample(only or list(self.kinds), len(only or self.kinds))
            self.job.wait_for_step(self.job.steps() + self.random.randint(2, 4))
            kind, started, restarts = waiting.pop(), time.monotonic(), self.restarts()
            allowed = self.kinds[kind]()
            self.faults.append(self.recovered(kind, restarts, allowed, started))
            print(f"{time.strftime('%T')}  {self.faults[-1]}", flush=True)

    def recovered(self, kind: str, restarts: int, allowed: int | None, started: float) -> Fault:
        """Waits until the run has gone on; measures what it lost."""
        before = self.seen
        if allowed is None:
            self.job.wait_for_step(before + 1)
            assert self.restarts() == restarts, f"{kind} must not restart the job\n{self.job.logs()}"
            return Fault(kind, before, None, 0, time.monotonic() - started)
        wait_until(lambda: self.restarts() > restarts, f"recovery from {kind}", self.job.logs)
        resumed = int(re.findall(r"resumed at step (\d+)", self.job.text())[-1])
        self.job.wait_for_step(resumed + 1)
        return Fault(kind, before, max(0, before - resumed), allowed, time.monotonic() - started)

    def restarts(self) -> int:
        return len(re.findall(r"resumed at step \d+", self.job.text()))

    def mark(self) -> None:
        self.seen = self.job.steps()

    def nodes(self) -> list[int]:
        names = self.cluster.call("scontrol", "show", "hostnames", self.job.nodes()).split()
        return [int(name[1:]) for name in names]

    # ---- faults: each returns how many steps may be lost, or None where the job must not restart

    def requeue(self) -> int:
        self.mark()
        self.cluster.call("scontrol", "requeue", self.job.id)
        return 0

    def notice(self) -> int:
        self.mark()
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.job.id)
        return 0

    def kill(self) -> int:
        self.mark()
        self.cluster.kill_ranks(self.random.choice(self.nodes()))
        return EVERY

    def hang(self) -> int:
        self.mark()
        self.cluster.kill_ranks(self.nodes()[1], signal.SIGSTOP)
        return EVERY

    def lose_link(self) -> int:
        node, restarts = self.nodes()[1], self.restarts()
        self.mark()
        self.cluster.link(node, "down")
        try:
            wait_until(lambda: self.restarts() > restarts, "another node", self.job.logs)
        finally:
            self.cluster.repair(node)
        return EVERY

    def truncate(self) -> int:
        def damage(newest: Path) -> None:
            victim = max(newest.rglob("*.distcp"), key=lambda p: p.stat().st_size)
            with victim.open("r+b") as file:
                file.truncate(victim.stat().st_size // 2)

        return self._damage(damage)

    def empty(self) -> int:
        def damage(newest: Path) -> None:
            shutil.rmtree(newest)
            newest.mkdir()

        return self._damage(damage)

    def _damage(self, damage: Callable[[Path], None]) -> int:
        """Kills the ranks and damages the newest checkpoint before the job starts again."""
        wait_until(lambda: len(list(self.store.glob("step_*"))) >= KEPT, "two checkpoints", self.job.logs)
        self.mark()
        self.cluster.kill_ranks(self.nodes()[0])
        wait_until(lambda: self.job.state == "PENDING", "the requeue", self.job.logs)
        damage(max(self.store.glob("step_*")))
        return 2 * EVERY

    def second_job(self) -> None:
        self.mark()
        output = self.folder / "second.out"
        second = self.cluster.submit(
            self.run_dir,
            self.tiny.config,
            "train.steps=100000",
            sbatch=("--nodes=1", f"--output={output}"),
            NPROC_PER_NODE="2",
        )
        second.output = output
        second.wait("FAILED")
        assert f"Slurm job {self.job.id}" in second.text(), second.text()
        output.unlink()
        self.mark()

    def fill_disk(self) -> None:
        ballast, failed = self.cluster.small / "ballast", self.job.text().count("WARNING: the checkpoint")
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        try:
            self.job.wait_for_text("WARNING: the checkpoint", failed + 1)
        finally:
            ballast.unlink()
        self.mark()

    # ---- the end

    def finish(self) -> list[str]:
        """Stops the run, trains the same steps without faults, and returns what differs."""
        self.cluster.call("scancel", "--batch", "--signal=USR2", self.job.id)
        self.job.wait()
        got = metrics(self.run_dir)
        process = self.tiny.start(f"train.steps={len(got)}")
        assert process.wait(LIMIT_S + 10 * len(got)) == 0, self.tiny.output()
        expected = metrics(self.tiny.run_dir)
        problems = [
            f"step {a['step']}: {key} is {a.get(key)}, without faults {b[key]}"
            for a, b in zip(got, expected, strict=True)
            for key in b
            if a.get(key) != b[key]
        ]
        too_many = [f for f in self.faults if (f.lost or 0) > f.allowed]
        problems += [f"{f.kind} at step {f.at_step} lost {f.lost} steps" for f in too_many]
        return problems

    def report(self, problems: list[str], minutes: float) -> dict[str, object]:
        steps = metrics(self.run_dir)
        recoveries = [f for f in self.faults if f.lost is not None]
        return {
            "minutes": round(minutes, 1),
            "steps": len(steps),
            "faults": len(self.faults),
            "by_kind": dict(Counter(f.kind for f in self.faults)),
            "recoveries": len(recoveries),
            "survived_without_restart": len(self.faults) - len(recoveries),
            "recovery_s_mean": round(sum(f.seconds for f in recoveries) / max(1, len(recoveries)), 1),
            "steps_repeated": sum(f.lost or 0 for f in recoveries),
            "most_steps_lost_at_once": max((f.lost or 0 for f in recoveries), default=0),
            "checkpoint_interval": EVERY,
            "curve_equal": not problems,
            "problems": problems[:20],
            "log": [asdict(f) for f in self.faults],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="time of the campaign, without the run to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", type=Path, help="folder of a cluster that is up; default: a new one")
    parser.add_argument("--only", action="append", default=[], help="kind of fault; may be repeated; default: all")
    parser.add_argument("--out", type=Path, help="where the report goes, as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="opd-campaign-"))
    try:
        cluster = Cluster(options.cluster or folder / "cluster")
    except NoCluster as reason:
        print(f"no campaign here: {reason}")
        return 3
    started = time.monotonic()
    campaign = None
    try:
        campaign = Campaign(cluster, folder / "run", options.seed)
        campaign.run(60 * options.minutes, options.only)
        minutes = (time.monotonic() - started) / 60
        problems = campaign.finish()
        report = campaign.report(problems, minutes)
    finally:
        if campaign is not None:
            campaign.job.cancel()
            shutil.rmtree(campaign.store, ignore_errors=True)
        if not options.cluster:
            cluster.down()
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "log"}, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
