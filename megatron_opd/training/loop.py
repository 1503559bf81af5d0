"""The training loop: one step on one page."""

from __future__ import annotations

from typing import Any

from megatron_opd.config import Config
from megatron_opd.errors import RepeatingError
from megatron_opd.runtime.ending import ending
from megatron_opd.runtime.guard import Requeue
from megatron_opd.scoring.prune_weights import assign_prune_weights
from megatron_opd.scoring.stop_event import weigh_stops
from megatron_opd.training.clock import PhaseClock
from megatron_opd.training.metrics import batch_metrics, memory_gib
from megatron_opd.training.metrics_log import add_warning
from megatron_opd.training.run import Run


class TrainingStopped(RepeatingError):
    """The run ended before its last step, for the reason in the message."""


def train(config: Config) -> None:
    """Trains to the last step, from the newest checkpoint of `run_dir` where there is one. Collective."""
    run = Run(config)
    with ending(run.close):
        begin(run)
        while not run.finished:
            advance(run)


def begin(run: Run) -> None:
    """What comes before the first step."""
    if run.unreported is not None:  # the job ended before or in the evaluation of its last step
        evaluate_and_report(run, run.unreported)
    elif run.config.eval.at_start and run.step == 0:
        run.evaluate()


def advance(run: Run) -> None:
    """One step, and the evaluation and checkpoint that are due after it."""
    config = run.config
    with run.guard.step(run.step + 1):
        metrics = step(run)
    saving = due(run.step, config.checkpoint.every)
    if run.eval_sets and (due(run.step, config.eval.every) or (run.finished and config.eval.at_end)):
        run.unreported = (
            metrics  # part of the checkpoint: an evaluation may take longer than the notice before a job's end
        )
        run.checkpoints.after_step(run.step, run.state, wanted=saving)
        saving = False
        if not run.guard.asked_to_leave():
            evaluate_and_report(run, metrics)
    else:
        run.report(metrics)
    leave = run.guard.asked_to_leave()
    alarmed = run.alarms.stops and bool(run.alarms.on)
    run.checkpoints.after_step(run.step, run.state, wanted=saving, must=run.finished or bool(leave) or alarmed)
    if run.totals.bad_in_a_row >= config.train.max_bad_steps:
        raise TrainingStopped(
            f"{run.totals.bad_in_a_row} steps in a row were not finite (train.max_bad_steps); the last: "
            f"{metrics['skipped']}"
        )
    if not run.finished:
        run.alarms.check(run.step)
    if leave and (run.unreported is not None or not run.finished):
        raise Requeue(f"{leave}: step {run.step} is finished and saved; start again to go on")


def evaluate_and_report(run: Run, metrics: dict[str, Any]) -> None:
    metrics["accuracy"], warning = run.evaluate()
    add_warning(metrics, warning)
    run.unreported = None
    run.report(metrics)


def step(run: Run) -> dict[str, Any]:
    """One optimizer step, from prompts to parameters that the engine has; returns its metrics."""
    config, rewards = run.config, {}
    clock = PhaseClock(run.progress.phase if run.progress else None)
    requests = run.draw_requests()
    rollouts, scores = run.scoring.generate_and_score(requests, run.sampling(), clock)
    with clock.phase("cut"):
        batch = assign_prune_weights(rollouts, scores, config.prune, run.scoring.signal)
        if run.token_weighting is not None:
            run.token_weighting.apply_to(batch)
        if run.rewards is not None:
            rewards = run.rewards.add_to(batch, requests)
        if run.stop.event:
            weigh_stops(batch, run.stop.student, config.loss.advantage_clip)
    with clock.phase("score"):
        taught = run.taught(batch)
    with clock.phase("train"):
        result = run.training_step(taught)
    budget = run.move_budget(batch.effective_length)
    run.step += 1
    with clock.phase("sync"):
        gaps = run.hand_over()
    numbers = batch_metrics(batch, run.scoring.engine.tokens_sampled)
    metrics = {"step": run.step} | clock.metrics() | numbers | budget | gaps | {"memory_gib": memory_gib(run.device)}
    metrics |= rewards | run.carried(batch) | run.by_teacher(batch) | result.metrics()
    metrics |= run.watch(batch, metrics)
    run.record(batch)
    if not result.applied:
        run.keep_bad_step(result.reason, batch)
    return metrics | run.totals.add(metrics, result.applied)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
