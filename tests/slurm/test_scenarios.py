"""What happens to jobs on a cluster, each time through `sbatch slurm/train_qwen3.sh`; all end with the same curve."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import EVERY, STEPS, Tiny
from tests.slurm.harness import Cluster, Job, metrics

pytestmark = pytest.mark.slurm
ALL = f"train.steps={STEPS}"


def resumed_at(job: Job) -> list[int]:
    return [int(step) for step in re.findall(r"resumed at step (\d+)", job.text())]


def test_clean_run(tiny: Tiny) -> None:
    """The reference itself: the curve of a run on one machine, and everything that it should leave behind."""
    assert tiny.run.train(ALL) == 0
    assert tiny.reference == tiny.run.metrics()

    text, logs = tiny.job.text(), tiny.job.run_dir / "logs" / f"{tiny.job.id}.0"
    assert "preflight: 2 nodes" in text and f"step {STEPS}/{STEPS}" in text and "done" in text
    for node in ("n1", "n2"):
        assert f"launch: {node}, node" in (logs / f"{node}.log").read_text()
        assert "interface e0" in (logs / f"{node}.log").read_text()
    environment = (logs / "environment.txt").read_text()
    assert "SOME_API_KEY=(redacted)" in environment and "not-for-others" not in environment
    assert f"SLURM_JOB_ID={tiny.job.id}" in environment
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert len((logs / "git.txt").read_text().split()[0]) == len(revision.stdout.strip())
    assert "megatron-core==" in (logs / "packages.txt").read_text()
    assert f"steps: {STEPS}" in (logs / "config.yaml").read_text()
    assert ALL in (logs / "command.txt").read_text()


def test_other_layout_across_nodes(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """Student PP2, teacher TP2 over the two nodes: the same curve within rounding."""
    job = cluster.submit(
        run_dir, tiny.config, ALL, "student.parallel={pipeline: 2}", "teacher.parallel={tensor: 2, sequence: true}"
    )
    job.wait()
    for got, expected in zip(metrics(run_dir), tiny.reference, strict=True):
        for key in ("loss", "reverse_kl", "overlap_mean", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), (got["step"], key)
        assert got["budget_next"] == expected["budget_next"]


def test_preemption_by_requeue(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    job = cluster.submit(run_dir, tiny.config, ALL)
    job.wait_for_step(3)
    cluster.call("scontrol", "requeue", job.id)
    job.wait()
    assert metrics(run_dir) == tiny.reference
    assert min(resumed_at(job)) >= 3, "SIGTERM leaves time to finish the step and save"


def test_time_limit(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """The notice before the time limit: save, requeue, go on."""
    job = cluster.submit(run_dir, tiny.config, ALL, "train.watchdog_s=300")
    job.wait_for_step(3)
    with cluster.frozen(2):  # the step goes on when Slurm has looked at the time, which it does twice a minute
        cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=5")
        job.wait_for_text("SIGUSR1: the ranks finish their step and save")
        cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait()
    assert "requeueing" in job.text()
    assert metrics(run_dir) == tiny.reference
    assert min(resumed_at(job)) >= 3


def test_stop_on_request(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """`scancel --batch --signal=USR2`: saved and ended, not requeued; submitted again, it goes on."""
    job = cluster.submit(run_dir, tiny.config, ALL)
    job.wait_for_step(1)
    cluster.call("scancel", "--batch", "--signal=USR2", job.id)
    job.wait()
    assert 1 <= len(metrics(run_dir)) < STEPS
    assert "stopped on request" in job.text()
    again = cluster.submit(run_dir, tiny.config, ALL)
    again.wait()
    assert metrics(run_dir) == tiny.reference


def test_killed_ranks(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """kill -9 of one node's ranks: the other node ends too, the job requeues itself."""
    job = cluster.submit(run_dir, tiny.config, ALL)
    job.wait_for_step(3)
    cluster.kill_ranks(2)
    job.wait()
    assert "failed with exit code" in job.text() and "rank 1 ended by SIGKILL on n2" in job.text()
    assert metrics(run_dir) == tiny.reference
    assert min(resumed_at(job)) >= EVERY


def test_lost_link(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """A node's link goes down for good in the middle of a step: stacks are written, another node takes over."""
    job = cluster.submit(run_dir, tiny.config, ALL, "train.watchdog_s=60", EXIT_GRACE_S="5")
    job.wait_for_step(3)
    first_nodes = job.nodes()
    cluster.link(2, "down")
    try:
        job.wait()
        assert (first_nodes, job.nodes()) == ("n[1-2]", "n[1,3]")
        assert metrics(run_dir) == tiny.reference
        assert min(resumed_at(job)) >= EVERY
        log = (run_dir / "logs" / f"{job.id}.0" / "n1.log").read_text()
        # by the watchdog, or by Slurm's SIGTERM if that gives up the node earlier
        assert re.search(r"rank 0 of 2 .*(train.watchdog_s|after SIGTERM)", log), "a rank that hangs says so"
        assert "training/loop.py" in log, "and where"
    finally:
        cluster.repair(2)


def test_truncated_checkpoint(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """The newest checkpoint is cut short between two jobs: it is named, the one before is taken."""
    cluster.submit(run_dir, tiny.config, "train.steps=4").wait()
    newest = run_dir / "checkpoints" / "step_000004"
    victim = max(newest.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size // 2)
    job = cluster.submit(run_dir, tiny.config, ALL)
    job.wait()
    assert "damaged checkpoint skipped" in job.text() and "step_000004" in job.text()
    assert resumed_at(job)[-1] == 2
    assert metrics(run_dir) == tiny.reference


def test_two_jobs_on_one_directory(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    job = cluster.submit(run_dir, tiny.config, ALL, "train.watchdog_s=600")
    job.wait_for_step(1)
    with cluster.frozen(2):
        second = cluster.submit(
            run_dir, tiny.config, ALL, sbatch=("--nodes=1", f"--output={run_dir}.second"), NPROC_PER_NODE="2"
        )
        second.output = run_dir.with_name(f"{run_dir.name}.second")
        second.wait("FAILED")
        assert f"Slurm job {job.id}" in second.text() and "requeueing" not in second.text()
    job.wait()
    assert metrics(run_dir) == tiny.reference and not resumed_at(job)


def test_full_disk(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """No space for a checkpoint: training goes on and says so; when there is space again, it saves."""
    place, ballast = cluster.small / "checkpoints", cluster.small / "ballast"
    place.mkdir()
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(place)
    try:
        job = cluster.submit(run_dir, tiny.config, ALL, "checkpoint.max_failures=100")
        job.wait_for_step(EVERY)
        job.wait_for_text(f"checkpoint of step {EVERY} saved")
        with ballast.open("wb", buffering=0) as file:  # a buffer would be written at the end, and fail once more
            while True:
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    break
        job.wait_for_text("WARNING: the checkpoint of step 4 failed")
        assert (place / "step_000002").is_dir(), "the last good checkpoint stays"
        ballast.unlink()
        job.wait()
        found = metrics(run_dir)
        warnings = [step.pop("warning") for step in found if "warning" in step]
        assert warnings and all("last checkpoint: step 2" in text for text in warnings), warnings
        assert job.text().count("SAVING FAILS") == len(warnings), "each line of progress says so"
        assert found == tiny.reference and not resumed_at(job)
        assert (place / f"step_{STEPS:06d}").is_dir() and not list(place.glob(".*partial"))
    finally:
        ballast.unlink(missing_ok=True)
        shutil.rmtree(place)


def test_preflight_names_a_slow_node(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """Three nodes, one with a bad link: the job stops before training and says which."""
    shape = "tc qdisc add dev mopd-v2 root tbf rate 40mbit burst 32k latency 400ms"
    if subprocess.run(shape.split(), capture_output=True).returncode:
        pytest.skip("this kernel has no tbf traffic shaper (sch_tbf)")
    try:
        job = cluster.submit(run_dir, tiny.config, ALL, sbatch=("--nodes=3",), PREFLIGHT="1")
        job.wait("FAILED")
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "mopd-v2", "root"], check=True)
    bad = re.findall(r"preflight: bad node (\w+)", job.text())
    assert bad and set(bad) == {"n2"}, job.text()
    assert re.search(r"n2: all-reduce with n1 reaches 0.00\d+ GB/s, the limit is [\d.]+ GB/s \(MIN_", job.text())
    assert "nothing was started" in job.text() and not metrics(run_dir)
