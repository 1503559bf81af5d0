"""What a run writes into its folder, apart from checkpoints and evaluations. Only the writing rank has it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_opd.checkpoint.directory import checkpoints_dir, find
from megatron_opd.config import Config, ConfigError, dump_config
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.files import write_whole
from megatron_opd.plugins import TRACKERS, load_part
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.records.lines import StepLines
from megatron_opd.records.positions import position_profile
from megatron_opd.records.reading import POSITIONS
from megatron_opd.records.responses import ResponseRecorder
from megatron_opd.records.starts import add_start, git_revision
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.trackers.base import Guarded, Tracker, TrackerSetup
from megatron_opd.training.metrics_log import MetricsLog, add_warning
from megatron_opd.types import ScoredBatch


def check_trackers(config: Config) -> None:
    """Before models are loaded. Raises ConfigError where `logging` names what is no tracker or is not installed, and
    where none of its trackers can do what `tracking` asks for."""
    kinds = [tracker_class(name) for name in config.logging]
    if twice := sorted({name for name in config.logging if config.logging.count(name) > 1}):
        raise ConfigError(f"logging: {twice[0]} is there twice; each tracker gets the metrics once")
    if config.tracking.checkpoints and not any(kind.artifact is not Tracker.artifact for kind in kinds):
        raise ConfigError(
            f"tracking.checkpoints: true: none of logging: {config.logging} keeps files; add wandb or mlflow"
        )


def tracker_class(name: str) -> type[Tracker]:
    """What an entry of `logging` names. Raises ConfigError."""
    if name in TRACKERS and find_spec(name) is None:
        raise ConfigError(f"logging: {name} is not installed; pip install 'megatron_opd[{name}]', or leave it out")
    kind = load_part("logging", name, TRACKERS)
    if not (isinstance(kind, type) and issubclass(kind, Tracker)):
        raise ConfigError(f"logging: {name} is no subclass of megatron_opd.trackers.base.Tracker")
    return kind


class RunFiles:
    """config.yaml, starts.jsonl, metrics.jsonl with its trackers, positions.jsonl and responses/."""

    def __init__(
        self, config: Config, step: int, first_reported: int, processes: int, tokenizer: Tokenizer, teachers: Teachers
    ) -> None:
        """step: finished ones; first_reported: whose metrics are still to be written. Raises OSError."""
        run_dir = config.run_dir
        self.config, self.tokenizer = config, tokenizer
        write_whole(Path(run_dir, "config.yaml"), [dump_config(config)])
        add_start(run_dir, step + 1, processes)
        self.metrics = MetricsLog(run_dir, first_reported, open_trackers(config, first_reported))
        self.positions = StepLines(Path(run_dir, POSITIONS), step + 1)
        self.recorder = ResponseRecorder(run_dir, config.train, tokenizer, teachers)
        self.recorder.drop_from(step + 1)
        self._warned: set[str] = set()
        self._warnings: list[str] = []
        self._sampled: list[list[Any]] = []  # some of the last step's responses, for trackers
        self._newest = -1  # the newest checkpoint that was sent

    def record(self, step: int, batch: ScoredBatch, signal: DriftSignal) -> None:
        """One step's responses and where they drift. What fails is a warning of the step's metrics, once."""
        self._try("positions.jsonl", lambda: self._add_positions(step, batch, signal))
        self._try("responses", lambda: self.recorder.record(step, batch, signal))
        if count := self.config.tracking.responses:
            self._sampled = [self._row(batch, i) for i in range(min(count, len(batch.rollouts)))]

    def report(self, metrics: dict[str, Any]) -> str:
        """One step's metrics; returns what is wrong with the disk, if anything."""
        for warning in self._warnings:
            add_warning(metrics, warning)
        self._warnings.clear()
        step = metrics["step"]
        if "accuracy" in metrics and self.metrics.trackers and self.config.tracking.responses:
            columns = ["prompt", "response", "answer", "ended", "effective_length"]
            rows = self._sampled
            self.metrics.send(lambda tracker: tracker.table(step, "responses", columns, rows))
            for name in metrics["accuracy"]:
                self._try(f"eval of {name}", partial(self._send_evaluation, step, name))
        if self.config.tracking.checkpoints and self.metrics.trackers:
            self._try("checkpoints", self._send_checkpoint)
        return self.metrics.write(metrics)

    def close(self) -> None:
        self.metrics.close()
        self.positions.close()

    def _add_positions(self, step: int, batch: ScoredBatch, signal: DriftSignal) -> None:
        profile = position_profile(batch, signal, self.config.prune.budget.maximum)
        if problem := self.positions.add({"step": step} | profile):
            raise OSError(problem)

    def _row(self, batch: ScoredBatch, i: int) -> list[Any]:
        r = batch.rollouts[i]
        text = self.tokenizer.decode(r.tokens.tolist())
        return [r.prompt.text, text, r.prompt.answer or "", r.end_reason, batch.effective_length[i]]

    def _send_evaluation(self, step: int, name: str) -> None:
        path = Path(self.config.run_dir, "eval", f"{name}-step{step}.jsonl")
        columns = ["response", "answer", "correct"]
        with path.open(encoding="utf-8") as file:
            records = [json.loads(line) for line in islice(file, self.config.tracking.responses)]
        rows = [[str(record.get(column, "")) for column in columns] for record in records]
        self.metrics.send(lambda tracker: tracker.table(step, f"eval/{name}", columns, rows))

    def _send_checkpoint(self) -> None:
        complete = [saved for saved in find(checkpoints_dir(self.config.run_dir)) if saved.step > self._newest]
        if complete:
            newest = max(complete, key=lambda saved: saved.step)
            self._newest = newest.step
            self.metrics.send(lambda tracker: _send_kept(tracker, newest.path))

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:
            if what not in self._warned:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                self._warnings.append(f"{what}: cannot be written: {reason}")
            self._warned.add(what)


def _send_kept(tracker: Tracker, path: Path) -> None:
    """A checkpoint that checkpoint.keep_last has removed meanwhile is no fault of the tracker's."""
    if path.is_dir():
        tracker.artifact(path.name, path)


def open_trackers(config: Config, first_step: int) -> list[Guarded]:
    """Those that `logging` names, each in a thread of its own."""
    tracking = config.tracking
    name = tracking.name or Path(config.run_dir).name
    notes = {"revision": git_revision(), "job": os.environ.get("SLURM_JOB_ID", "")}
    setup = TrackerSetup(config.run_dir, tracking.project, name, config.model_dump(mode="json"), first_step, notes)
    kinds = [tracker_class(name) for name in config.logging]
    return [Guarded(kind.__name__, partial(kind, setup)) for kind in kinds]
