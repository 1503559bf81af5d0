"""The cluster and the uninterrupted run that every scenario is compared with, once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import Cluster, Job, NoCluster, metrics
from tests.tiny_run import TinyRun

STEPS = 6
EVERY = 2  # steps between checkpoints: checkpoint.every of TinyRun


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(os.environ.get("SLURM_TEST_CLUSTER") or tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster = Cluster(folder)
    except NoCluster as reason:
        pytest.skip(str(reason))
    yield cluster
    if "SLURM_TEST_CLUSTER" not in os.environ:  # else whoever started it takes it down
        cluster.down()


@dataclass
class Tiny:
    """Models, prompts, the config, and the metrics of the run that nothing happened to."""

    run: TinyRun
    reference: list[dict[str, Any]]
    job: Job

    @property
    def config(self) -> Path:
        return self.run.config


@pytest.fixture(scope="session")
def tiny(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Student TP2 and teacher PP2, a rank on each of two nodes: both kinds of parallelism cross the network."""
    run = TinyRun(tmp_path_factory.mktemp("tiny"))
    job = cluster.submit(
        run.folder / "reference", run.config, f"train.steps={STEPS}", PREFLIGHT="1", SOME_API_KEY="not-for-others"
    )
    job.wait()
    found = metrics(job.run_dir)
    assert [m["step"] for m in found] == list(range(1, STEPS + 1))
    return Tiny(run, found, job)


@pytest.fixture
def run_dir(tiny: Tiny, request: pytest.FixtureRequest) -> Path:
    return tiny.run.folder / request.node.name
