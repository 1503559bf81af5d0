"""The training loop: one step on one page."""

from __future__ import annotations

from typing import Any

from megatron_opd.config import Config
from megatron_opd.errors import RepeatingError
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.runtime.ending import ending
from megatron_opd.runtime.guard import Requeue
from megatron_opd.scoring.judge import judge, use_rewards
from megatron_opd.scoring.score import score, to_the_end
from megatron_opd.training.metrics import PhaseClock, step_metrics
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
    if run.owed is not None:  # the job ended before or in the evaluation of its last step
        evaluate_and_report(run, run.owed)
    elif run.config.eval.at_start and run.step == 0:
        run.evaluate()


def advance(run: Run) -> None:
    """One step, and the evaluation and checkpoint that are due after it."""
    config = run.config
    with run.guard.step(run.step + 1):
        metrics = step(run)
    saving = due(run.step, config.checkpoint.every)
    if run.eval_sets and (due(run.step, config.eval.every) or (run.finished and config.eval.at_end)):
        run.owed = metrics  # part of the checkpoint: an evaluation may take longer than the notice before a job's end
        run.checkpoints.after_step(run.step, run.state, wanted=saving)
        saving = False
        if not run.guard.asked_to_leave():
            evaluate_and_report(run, metrics)
    else:
        run.report(metrics)
    leave = run.guard.asked_to_leave()
    run.checkpoints.after_step(run.step, run.state, wanted=saving, must=run.finished or bool(leave))
    if run.totals.bad_in_a_row >= config.train.max_bad_steps:
        raise TrainingStopped(
            f"{run.totals.bad_in_a_row} steps in a row were not finite (train.max_bad_steps); the last: "
            f"{metrics['skipped']}"
        )
    if leave and (run.owed is not None or not run.finished):
        raise Requeue(f"{leave}: step {run.step} is finished and saved; start again to go on")


def evaluate_and_report(run: Run, metrics: dict[str, Any]) -> None:
    metrics["accuracy"] = run.evaluate()
    run.owed = None
    run.report(metrics)


def step(run: Run) -> dict[str, Any]:
    """Generate, score, judge, train, hand over: one optimizer step and its metrics."""
    config, clock = run.config, PhaseClock()
    prune, settings = config.prune, config.train
    prompts = run.loader.next_batch(settings.prompts_per_step)
    copies = settings.responses_per_prompt
    requests = [Request(prompt, i * copies + j) for i, prompt in enumerate(prompts) for j in range(copies)]
    budget = run.budget.current
    sampling = Sampling(
        max_tokens=budget,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        seed=settings.seed * 1_000_003 + run.step,
        top_logprobs=config.candidates if config.score.mode == "separate" else 0,
    )
    rollouts, scores = score(run.engine, run.trainer.teacher, requests, sampling, config, clock)
    with clock.phase("cut"):
        batch = judge(rollouts, scores, prune)
        if prune.after_drift == "grpo":
            members = to_the_end(requests, config)
            use_rewards(batch, run.rewards(rollouts, members), members, copies, prune.grpo_coefficient)
    with clock.phase("train"):
        result = run.training_step(batch)
    hit_ratio = run.budget.measure(batch.effective_length)
    if prune.signal != "none":
        run.budget.update_from_hit_ratio(hit_ratio)
    run.step += 1
    with clock.phase("sync"):
        gaps = run.hand_over()
    metrics = step_metrics(run.step, clock, batch, run.budget, hit_ratio, budget) | gaps
    metrics |= {"loss": result.loss, "grad_norm": result.grad_norm, "lr": run.trainer.optimizer.param_groups[0]["lr"]}
    metrics |= {"microbatches": result.microbatches}
    if result.gap_mean is not None:
        metrics |= {"rollout_logprob_gap_mean": result.gap_mean, "rollout_logprob_gap_max": result.gap_max}
        metrics |= {"rollout_logprob_gap_count": result.gap_count}
    totals = run.totals
    totals.bad_in_a_row = 0 if result.applied else totals.bad_in_a_row + 1
    totals.bad_steps += not result.applied
    if not result.applied:
        metrics["skipped"] = result.reason
        run.keep_bad_step(result.reason, batch)
    totals.tokens_generated += metrics["tokens_generated"]
    totals.tokens_trained += metrics["tokens_trained"]
    totals.wall_s += metrics["step_s"]
    return metrics | {"skipped_steps": totals.bad_steps, "wall_s": totals.wall_s}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
