"""Handles for the tests in this folder: the cluster of cluster.sh, its jobs, and faults to inject."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
LIMIT_S = float(os.environ.get("SLURM_TEST_LIMIT_S", "420"))  # of one wait; a loaded machine takes long to start Python


class NoCluster(Exception):
    """This machine cannot run one; the message says why."""


class Cluster:
    """Two nodes for a job, n1 and n2, and n3 to spare."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.small = folder / "small"  # a file system of 48 MB
        done = subprocess.run([str(SCRIPT), "up", str(folder)], capture_output=True, text=True)
        if done.returncode == 3:
            raise NoCluster(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        # not what an interactive user may have set for jobs of their own
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "NCCL_"))}
        self.environment = kept | {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "PATH": path}

    def down(self) -> None:
        subprocess.run([str(SCRIPT), "down", str(self.folder)], check=True)

    def call(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        run_dir: Path,
        config: Path,
        *overrides: str,
        script: str = "train_qwen3.sh",
        sbatch: tuple[str, ...] = (),
        **settings: str,
    ) -> Job:
        """`sbatch slurm/train_qwen3.sh OVERRIDES`, or another script; `settings`: environment variables of the job."""
        run_dir.mkdir(parents=True, exist_ok=True)
        environment = (
            self.environment
            | {
                "CONFIG": str(config),
                "RUN_DIR": str(run_dir),
                "PYTHON": sys.executable,
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "MIN_FREE_GB": "0.001",
                "PREFLIGHT": "0",
                "EXIT_GRACE_S": "15",
                "PYTHONDONTWRITEBYTECODE": "",
            }
            | settings
        )
        output = run_dir.parent / f"{run_dir.name}.out"
        command = ["sbatch", "--parsable", f"--output={output}", *sbatch, f"slurm/{script}", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), run_dir, output)

    def ranks(self, node: int) -> list[int]:
        """Process ids of the training ranks on a node."""
        pids = subprocess.run(["ip", "netns", "pids", f"mopd-n{node}"], capture_output=True, text=True).stdout.split()
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):
                if "megatron_opd.cli" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    found.append(int(pid))
        return found

    def kill_ranks(self, node: int, number: int = signal.SIGKILL) -> None:
        pids = self.ranks(node)
        assert pids, f"no ranks on n{node}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def frozen(self, node: int) -> Iterator[None]:
        """The ranks of a node stand still: the step goes on when this ends."""
        self.kill_ranks(node, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(AssertionError):
                self.kill_ranks(node, signal.SIGCONT)

    def link(self, node: int, state: str) -> None:
        subprocess.run([str(SCRIPT), "link", str(self.folder), str(node), state], check=True)

    def repair(self, node: int) -> None:
        """Brings the link up, ends what a lost job has left there, and gives the node back to Slurm."""
        self.link(node, "up")
        for pid in self.ranks(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), f"n{node} is back", self._nodes)

    def node_state(self, node: int) -> str:
        return self.call("sinfo", "-h", "-n", f"n{node}", "-o", "%T").rstrip("*")

    def _nodes(self) -> str:
        return self.call("sinfo", "-N", "-o", "%N %T %E")


@dataclass
class Job:
    """A submitted job and its run directory."""

    cluster: Cluster
    id: str
    run_dir: Path
    output: Path

    def info(self) -> dict[str, str]:
        """scontrol's fields; a job stays there for five minutes after its end."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    @property
    def state(self) -> str:
        return self.info()["JobState"]

    def nodes(self) -> str:
        return self.info()["NodeList"]

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def steps(self) -> int:
        return len(metrics(self.run_dir))

    def logs(self) -> str:
        """Everything that this run has written for people."""
        parts = [f"--- {self.output}\n{self.text()}"]
        for path in sorted(self.run_dir.glob("logs/*/*.log")):
            parts.append(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are in the metrics; fails if the job ends before."""

        def there() -> bool:
            assert self.state in ("PENDING", "RUNNING", "COMPLETING"), f"the job ended early\n{self.logs()}"
            return self.steps() >= step

        wait_until(there, f"step {step}", self.logs)

    def wait_for_text(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.text().count(text) >= count, repr(text), self.logs)

    def wait(self, state: str = "COMPLETED") -> None:
        """Until the job, requeued as often as need be, is over; fails unless it ends in `state`."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
        wait_until(lambda: self.state in over, "the end of the job", self.logs)
        assert self.state == state, f"{self.state}\n{self.logs()}"

    def cancel(self) -> None:
        """Ends it whatever its state, and waits for it."""
        for options in (["--quiet"], ["--quiet", "--signal=KILL"]):
            with contextlib.suppress(AssertionError):  # it is over already
                self.cluster.call("scancel", *options, self.id)
        wait_until(lambda: not self.queued(), "the end", self.logs)

    def queued(self) -> bool:
        """Whether it waits, runs or is being cleared away."""
        return self.id in self.cluster.call("squeue", "-h", "-o", "%i").split()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, one dict a step, without times."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # being written
            found.append({k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_gib"))})
    return found


def wait_until(condition: Callable[[], bool], what: str, explain: Callable[[], str], limit_s: float = LIMIT_S) -> None:
    """Looks five times a second; fails with `explain()` when the limit is over."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}\n{explain()}"
        time.sleep(0.2)
