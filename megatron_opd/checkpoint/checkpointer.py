"""Saves and resumes a run: when, what happens where a save fails, and which checkpoint a run goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_opd.checkpoint import directory
from megatron_opd.checkpoint.directory import SavedCheckpoint
from megatron_opd.checkpoint.rng import rng_state, set_rng_state
from megatron_opd.checkpoint.shards import get_adam_step, optimizer_entries, parameter_entries, set_adam_step
from megatron_opd.checkpoint.writer import ShardWriter
from megatron_opd.compat.dist_checkpointing import METADATA, CheckpointException, WriteResult, load
from megatron_opd.compat.megatron import restart_scheduler
from megatron_opd.config import Config
from megatron_opd.errors import RepeatingError, describe
from megatron_opd.files import remove_tree
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import all_gather, is_rank_0, on_rank_0, together
from megatron_opd.weights.converted import copy_side_files, load_converted, manifest_of, root_cause
from megatron_opd.weights.hf_files import ModelFileError

_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "num_experts",
    "moe_intermediate_size",
)


class CheckpointError(RepeatingError):
    """A run cannot be resumed or can no longer be saved; the message names the checkpoint and the reason."""


class Trained(Protocol):
    """What a checkpoint is made of."""

    @property
    def student(self) -> Model: ...

    @property
    def optimizer(self) -> MegatronOptimizer: ...

    @property
    def scheduler(self) -> OptimizerParamScheduler: ...


T = TypeVar("T")
Shards = tuple[list[WriteResult], list[WriteResult]]  # one rank's, of parameters and optimizer


@dataclass
class _Save:
    """A save in progress. `work` is this rank's part of the present act: its shards, then the sealing on rank 0."""

    step: int
    partial: Path
    work: Future[Shards | None]
    sealing: bool = False


class Checkpointer:
    """All methods are collective: every rank calls them at the same step, and one rank's failure is everybody's.

    A failed save does not stop training. It is repeated at the following steps; `warning` says so until one succeeds.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trained,
        say: Callable[[str], None],
        tensors: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """`say` prints a line for the user (on one rank). `tensors`: of the loop's state, the same on every rank, what
        is no JSON."""
        self.config, self.settings = config, config.checkpoint
        self.trainer, self.say, self.tensors = trainer, say, tensors
        self.carried: dict[str, Tensor] = {}  # such tensors of the checkpoint that was loaded
        self.student = trainer.student
        self.root = directory.checkpoints_dir(config.run_dir)
        self.last_step: int | None = None  # of the newest complete checkpoint
        self.failures = 0  # in a row
        self.problem = ""
        self.seconds = 0.0  # that training has waited for saves, since `take_seconds`
        self._parameters, self._optimizer = ShardWriter(), ShardWriter()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._unsaved = False  # a save that failed or had to wait for the previous one

    @property
    def warning(self) -> str:
        """What to tell the user at every step, or empty."""
        if not self.failures:
            return ""
        last = "no checkpoint yet" if self.last_step is None else f"last checkpoint: step {self.last_step}"
        return f"SAVING FAILS ({self.failures} in a row, {last}): {self.problem}"

    def take_seconds(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def after_step(self, step: int, state: Callable[[], dict[str, Any]], wanted: bool, must: bool = False) -> None:
        """Saves where `wanted`, goes on with a save in the background, repeats a failed one.

        With `must` (the run ends here) it returns when this step is saved. Raises CheckpointError after
        `checkpoint.max_failures` failures in a row.
        """
        started = time.perf_counter()
        self._advance(wait=must)
        if must:
            while self.last_step != step:
                self._begin(step, state(), background=False)
                self._advance(wait=True)
                if self.failures:
                    time.sleep(min(2.0**self.failures, 30.0))
        elif wanted or self._unsaved:
            if self._save is None:
                self._begin(step, state(), self.settings.asynchronous)
            else:
                self._unsaved = True
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Waits for a save in the background, unless the other ranks may be gone."""
        self._background.shutdown(wait=True)

    def load_latest(self) -> dict[str, Any] | None:
        """Fills student, optimizer and scheduler from the newest complete checkpoint and returns the loop's state.

        Damaged checkpoints are named and skipped. Returns None where there is none at all. Raises CheckpointError
        where all are damaged, where the checkpoint is of another model, or with `resume: never` where there is one.
        """
        candidates = self._find()
        if not candidates:
            return None
        if self.settings.resume == "never":
            raise CheckpointError(
                f"{candidates[0].path} exists and checkpoint.resume is never; set checkpoint.resume: auto to go on "
                "from it, or choose another run_dir"
            )
        damaged = []
        for candidate in candidates:
            problem = candidate.problem
            if not problem:
                with together():
                    self._check_model(candidate)
                try:
                    state = self._load(candidate.path)
                except (CheckpointError, ModelFileError) as error:
                    problem = str(error)
                else:
                    self.last_step = candidate.step
                    return state
            damaged.append(f"{candidate.path}: {problem}")
            self.say(f"WARNING: damaged checkpoint skipped: {damaged[-1]}")
        raise CheckpointError(
            "no checkpoint of this run is complete; restore one, or remove them to start over:\n  "
            + "\n  ".join(damaged)
        )

    # ---- saving

    def _begin(self, step: int, state: dict[str, Any], background: bool) -> None:
        partial = directory.partial_path(self.root, step)
        self._unsaved = False
        everybodys_rng = all_gather(rng_state(), None)
        carried = self.tensors()  # a step makes new ones: these stay as they are while they are written
        try:
            on_rank_0(lambda: _make_partial(partial), otherwise=CheckpointError)
        except CheckpointError as error:
            self._failed(step, str(error))
            return
        optimizer = self.trainer.optimizer
        parameters = self._parameters.prepare(parameter_entries(self.student), background)
        moments = self._optimizer.prepare(optimizer_entries(self.student, optimizer, loading=False), background)
        text = json.dumps(
            {
                "loop": state,
                "adam_step": get_adam_step(optimizer),
                "scheduler": self.trainer.scheduler.state_dict(),
                "rng": everybodys_rng,
            }
        )

        def write() -> Shards | None:
            if is_rank_0():
                copy_side_files(self.config.student.model, partial, self.student.config.params_dtype)
                (partial / directory.STATE).write_text(text, encoding="utf-8")
                if carried:
                    save_file(carried, partial / directory.CARRIED)
            return (
                self._parameters.write(parameters, partial / directory.PARAMETERS),
                self._optimizer.write(moments, partial / directory.OPTIMIZER),
            )

        self._save = _Save(step, partial, self._start(write, background))
        self._advance(wait=not background)

    def _advance(self, wait: bool) -> None:
        """Goes on to the next act of a save where all ranks have finished this one."""
        save = self._save
        if save is None:
            return
        if wait:
            save.work.exception()
        done = torch.tensor(int(save.work.done()))
        dist.all_reduce(done, dist.ReduceOp.MIN)
        if not done:
            return
        error = save.work.exception()
        outcomes = all_gather((describe(error) if error else "", None if error else save.work.result()), None)
        problems = [problem for problem, _ in outcomes if problem]
        if problems:
            self._save = None
            self._failed(save.step, problems[0], save.partial)
        elif save.sealing:
            self._save = None
            self.last_step, self.failures, self.problem = save.step, 0, ""
            self.say(f"checkpoint of step {save.step} saved")
        else:
            results = [result for _, result in outcomes if result is not None]
            save.work = self._start(lambda: self._seal(save, results), background=not wait)
            save.sealing = True
            self._advance(wait)

    def _seal(self, save: _Save, results: list[Shards]) -> None:
        if not is_rank_0():
            return
        self._parameters.finish([parameters for parameters, _ in results], save.partial / directory.PARAMETERS)
        self._optimizer.finish([moments for _, moments in results], save.partial / directory.OPTIMIZER)
        notes = {"step": save.step, "model": _shapes(self.student), "world": dist.get_world_size()}
        manifest = manifest_of(self.student) | {"checkpoint": notes}
        directory.seal(save.partial, directory.final_path(self.root, save.step), manifest)
        directory.remove_old(self.root, self.settings.keep_last, self.settings.keep_every)

    def _failed(self, step: int, problem: str, partial: Path | None = None) -> None:
        if is_rank_0() and partial is not None:
            remove_tree(partial)
        self.failures += 1
        self.problem = problem
        self._unsaved = True
        self.say(f"WARNING: the checkpoint of step {step} failed: {problem}")
        if self.failures >= self.settings.max_failures:
            last = "there is none" if self.last_step is None else f"step {self.last_step} is untouched"
            raise CheckpointError(
                f"{self.failures} saves in a row failed (checkpoint.max_failures), the last, of step {step}, with: "
                f"{problem}. The last complete checkpoint: {last}. Make room or repair {self.root}, then start again"
            )

    def _start(self, work: Callable[[], T], background: bool) -> Future[T]:
        if background:
            return self._background.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:  # any: the other ranks must hear of it
            future.set_exception(error)
        return future

    # ---- loading

    def _find(self) -> list[SavedCheckpoint]:
        def find() -> list[SavedCheckpoint]:
            left = directory.remove_partial(self.root)
            if left:
                self.say(f"removed what an interrupted save had left: {', '.join(left)}")
            return directory.find(self.root)

        return on_rank_0(find, otherwise=CheckpointError)

    def _check_model(self, candidate: SavedCheckpoint) -> None:
        """Raises CheckpointError where the checkpoint is of another model than `student.model`."""
        manifest = directory.read_manifest(candidate.path)
        saved = {**manifest["checkpoint"]["model"], "precision": manifest["dtype"]}
        own = {**_shapes(self.student), "precision": str(self.student.config.params_dtype).removeprefix("torch.")}
        different = [f"{key} {saved.get(key)} there, {own[key]} here" for key in own if saved.get(key) != own[key]]
        if different:
            raise CheckpointError(
                f"{candidate.path} is a checkpoint of another student than student.model {self.config.student.model}: "
                f"{'; '.join(different)}. Choose another run_dir or restore student.model"
            )

    def _load(self, path: Path) -> dict[str, Any]:
        student, optimizer = self.student, self.trainer.optimizer
        state: dict[str, Any] = {}
        carried: dict[str, Tensor] = {}
        with together():  # before the collective reading, in which a rank must not be alone with its error
            try:
                state = json.loads((path / directory.STATE).read_text(encoding="utf-8"))
                for part in (directory.PARAMETERS, directory.OPTIMIZER):
                    (path / part / METADATA).read_bytes()
                if (path / directory.CARRIED).exists():
                    carried = load_file(path / directory.CARRIED)
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path}: {error}") from error
        load_converted(student, path)
        with together():
            entries = optimizer_entries(student, optimizer, loading=True)
            try:
                load(entries, path / directory.OPTIMIZER)
            except (Exception, CheckpointException) as error:  # many kinds, from Megatron-Core, torch and pickle
                raise CheckpointError(f"{directory.OPTIMIZER}/ cannot be loaded: {root_cause(error)}") from error
        self.carried = carried
        set_adam_step(optimizer, state["adam_step"])
        restart_scheduler(self.trainer.scheduler, state["scheduler"])
        rng = state["rng"]
        set_rng_state(rng[dist.get_rank()] if len(rng) == dist.get_world_size() else rng[0])
        return state["loop"]


def _make_partial(partial: Path) -> None:
    remove_tree(partial)
    for part in (directory.PARAMETERS, directory.OPTIMIZER):
        (partial / part).mkdir(parents=True)


def _shapes(student: Model) -> dict[str, Any]:
    config = student.bridge.hf_config
    return {key: getattr(config, key) for key in _SHAPE_KEYS if getattr(config, key, None) is not None}
