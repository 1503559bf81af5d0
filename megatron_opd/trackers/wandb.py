"""Weights & Biases, offline where WANDB_MODE says so; `wandb sync RUN/wandb/offline-*` sends it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.trackers.base import Tracker, TrackerSetup

STEP = "train_step"  # W&B's own step only counts up; this one goes back with a resume


class WandB(Tracker):
    """One W&B run for all starts of a run."""

    def __init__(self, setup: TrackerSetup) -> None:
        import wandb

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=setup.project,
            name=setup.name,
            id=setup.own_id("wandb"),
            resume="allow",
            dir=setup.run_dir,
            config=setup.config | {"notes": setup.notes},
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values | {STEP: step})

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.run.log({name: self.wandb.Table(columns=columns, data=rows), STEP: step})

    def artifact(self, name: str, path: Path) -> None:
        artifact = self.wandb.Artifact(f"{self.run.id}-{name}", type="checkpoint")
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()
