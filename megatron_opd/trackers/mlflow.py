"""MLflow, at MLFLOW_TRACKING_URI; without it, in RUN/mlflow.db, which shows
`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_opd.trackers.base import Tracker, TrackerSetup, plain_name


class MLflow(Tracker):
    """One MLflow run for all starts of a run."""

    def __init__(self, setup: TrackerSetup) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.Metric = Metric
        folder = Path(setup.run_dir).absolute()
        uri, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            uri, files = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow").as_uri()
        self.client: Any = MlflowClient(tracking_uri=uri, registry_uri=files)
        experiment = self.client.get_experiment_by_name(setup.project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(setup.project, files)
        self.run_id = setup.known_id("mlflow") or ""
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
            return
        tags = {"mlflow.runName": setup.name} | {key: value for key, value in setup.notes.items() if value}
        self.run_id = self.client.create_run(number, tags=tags).info.run_id
        setup.remember_id("mlflow", self.run_id)
        flat = _leaves(setup.config)
        for start in range(0, len(flat), 100):  # the service's bound on one request
            params = [Param(key, value[:500]) for key, value in flat[start : start + 100]]
            self.client.log_batch(self.run_id, params=params)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.Metric(plain_name(name), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        text = json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)
        self.client.log_text(self.run_id, text, f"{name}/step_{step:06d}.json")

    def artifact(self, name: str, path: Path) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), name)
        else:
            self.client.log_artifact(self.run_id, str(path), name)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A config's keys with dots, and their values as text."""
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return leaves
