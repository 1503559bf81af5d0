"""One evaluation: generate, verify, save, summarize; the same code during training and for `megatron-opd eval`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opd.config import DataConfig, EvalConfig, EvalSetConfig
from megatron_opd.data.prompts import PromptSet, load_eval_prompts
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.evaluation.metrics import JudgedResponse, summarize
from megatron_opd.evaluation.responses import ResponseFile, judged_response, old_name, request_key
from megatron_opd.evaluation.verifiers import Case, Verdict, VerifierError, VerifierPool, response_text
from megatron_opd.files import write_whole
from megatron_opd.parallel.collective import on_rank_0
from megatron_opd.plugins import is_own
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling
from megatron_opd.types import END_LENGTH, Prompt, Rollout

log = logging.getLogger(__name__)


class EvaluationError(RunError):
    """The writing rank could not verify, save or read back responses; raised on every rank alike."""


@dataclass(frozen=True)
class EvalSet:
    """One data set to evaluate on, with its settings."""

    config: EvalSetConfig
    prompts: PromptSet


def load_eval_sets(settings: EvalConfig, data: DataConfig, tokenizer: Tokenizer) -> list[EvalSet]:
    """Reads the prompts of every configured set, and starts each verifier of the user's own once, so that one that is
    not there ends the run before it has begun. Collective. Raises DataError naming the set, ConfigError."""
    sets = [EvalSet(s, load_eval_prompts(s, data, tokenizer)) for s in settings.sets]
    for name in dict.fromkeys(s.verifier for s in settings.sets if is_own(s.verifier)):
        on_rank_0(partial(try_verifier, "eval.sets", name))
    return sets


def try_verifier(key: str, name: str) -> None:
    """Raises ConfigError naming the config's key where the verifier cannot be started."""
    with VerifierPool(name, workers=1) as pool:
        try:
            pool.start()
        except VerifierError as error:
            raise ConfigError(f"{key}: {error}") from error


def evaluate(
    engine: RolloutEngine,
    sets: list[EvalSet],
    tokenizer: Tokenizer,
    settings: EvalConfig,
    out_dir: str | Path,
    step: int,
    is_writer: bool,
    parameters: str = "",
    files_may_fail: bool = False,
) -> dict[str, Any]:
    """Evaluates the engine's current parameters on every set. Collective: all ranks call it with equal arguments.

    Rank 0 (`is_writer`) verifies and writes `out_dir/NAME-stepSTEP.jsonl`, one response a line, and the summary
    `out_dir/stepSTEP.json`. Called again after an interruption it generates only what that file lacks. A response is
    taken from it where `parameters` (the fingerprint of the engine's), the prompt, the sample and the sampling settings
    are the same; what it was worth is judged anew, since a verifier or an answer may have been mended. Files of another
    evaluation are kept beside those that take their names. With `files_may_fail` (while training, where the numbers go
    to the metrics, too) the evaluation goes on without files that cannot be written, and a warning says so.

    Returns, on every rank: {"accuracy": {set: avg@k}, "sets": {set: see `metrics.summarize`, plus too_long and
    beyond_limit: prompts left out, replaced: responses of another evaluation that stood in the file, verdicts_changed:
    of responses that were taken from it}, "problems": {set: what went wrong with verifiers, and on which response},
    "notes": {set: the same as sentences}, "warnings": [files that could not be written, and why]}.

    Raises:
        EvaluationError: no space left, ...; on every rank.
        VerifierError: the verifier cannot start; on every rank.
    """
    if is_writer != (not dist.is_initialized() or dist.get_rank() == 0):
        raise ValueError("is_writer must be true on rank 0 and nowhere else")
    out_dir = Path(out_dir)
    result: dict[str, Any] = {"accuracy": {}, "sets": {}, "problems": {}, "notes": {}, "warnings": []}
    for eval_set in sets:
        name = eval_set.config.name
        judge = _Judge(eval_set, tokenizer, settings, out_dir / f"{name}-step{step}.jsonl", files_may_fail)
        try:
            numbers, problems, warnings = _evaluate_set(engine, judge, parameters)
        finally:
            judge.close()
        result["sets"][name] = numbers
        result["warnings"] += warnings
        if notes := _notes(numbers):
            result["notes"][name] = notes
        result["accuracy"][name] = numbers["accuracy"]
        if problems:
            result["problems"][name] = problems
            if is_writer:
                log.warning(
                    "%s: %d responses counted as wrong, as they could not be judged: %s ...",
                    name,
                    len(problems),
                    problems[0],
                )
    path = out_dir / f"step{step}.json"
    result["warnings"] += on_rank_0(
        lambda: _try_files(lambda: _write_summary(path, {"step": step, **result}), path, files_may_fail),
        otherwise=EvaluationError,
    )
    return result


def _try_files(action: Callable[[], object], path: Path, may_fail: bool) -> list[str]:
    """Runs it; where files may fail, returns what the system said of them, as a list of one or none."""
    try:
        action()
    except OSError as error:
        if not may_fail:
            raise
        return [f"{path} cannot be written: {error.strerror or error}"]
    return []


def _notes(numbers: dict[str, float]) -> list[str]:
    """What the numbers leave out or replace, in words."""
    kinds = (
        ("too_long", "prompts left out: longer than data.max_prompt_tokens"),
        ("beyond_limit", "prompts left out: behind the set's limit"),
        ("verifier_problems", "responses without a verdict, counted as wrong"),
        ("replaced", "earlier responses of other parameters, prompts or settings replaced; kept as NAME.old.jsonl"),
        ("verdicts_changed", "earlier verdicts changed; the old ones are kept as NAME.old.jsonl"),
    )
    return [f"{numbers[key]:.0f} {text}" for key, text in kinds if numbers[key]]


def _evaluate_set(
    engine: RolloutEngine, judge: _Judge, parameters: str
) -> tuple[dict[str, float], list[str], list[str]]:
    config, settings = judge.eval_set.config, judge.settings
    sampling = Sampling(config.max_tokens, config.temperature, config.top_p, seed=settings.seed)
    k, version = config.responses_per_prompt, engine.policy_version
    prompts = judge.eval_set.prompts.prompts
    requests = [Request(prompt, i * k + s) for i, prompt in enumerate(prompts) for s in range(k)]
    # The whole of it, so that a later field cannot be forgotten; the engine, as each has a sampler of its own.
    how = {**asdict(sampling), "engine": type(engine).__name__, "eos": sorted(judge.tokenizer.eos_ids)}
    keys = [request_key(parameters, how, r) for r in requests]
    pending = on_rank_0(partial(judge.resume, requests, keys), otherwise=EvaluationError)
    for start in range(0, len(pending), settings.chunk_responses):
        chunk = pending[start : start + settings.chunk_responses]
        rollouts = engine.generate([requests[i] for i in chunk], sampling)
        if [r.index for r in rollouts] != [requests[i].index for i in chunk]:
            raise EvaluationError("the rollout engine returned other responses than were asked for")
        stale = {r.policy_version for r in rollouts} - {version}
        if stale:
            raise EvaluationError(f"responses come from policy versions {sorted(stale)}, the engine holds {version}")
        chunk_keys = [keys[i] for i in chunk]
        on_rank_0(partial(judge.add, rollouts, chunk_keys), otherwise=EvaluationError)
    return on_rank_0(judge.summary, otherwise=EvaluationError)


class _Judge:
    """What the writing rank does for one set; on other ranks it does nothing."""

    def __init__(self, eval_set: EvalSet, tokenizer: Tokenizer, settings: EvalConfig, path: Path, files_may_fail: bool):
        self.eval_set = eval_set
        self.tokenizer = tokenizer
        self.settings = settings
        self.file = ResponseFile(path) if settings.save_responses else None
        self.files_may_fail = files_may_fail
        self.warnings: list[str] = []
        self.judged: dict[str, JudgedResponse] = {}
        self.replaced = self.verdicts_changed = 0
        self.pool = VerifierPool(eval_set.config.verifier, settings.verifier_timeout_s, settings.verifier_workers)

    def resume(self, requests: list[Request], keys: list[str]) -> list[int]:
        """Takes over responses of an earlier attempt; returns the positions in `keys` still to be generated."""
        if self.file is not None:
            prompts = {key: request.prompt for request, key in zip(requests, keys, strict=True)}
            self._with_file(lambda file: self._take_over(file, prompts))
        return [i for i, key in enumerate(keys) if key not in self.judged]

    def _with_file(self, action: Callable[[ResponseFile], object]) -> None:
        """Does something with the file of responses; one that fails is done without from then on, where it may."""
        if self.file is not None:
            file = self.file
            self.warnings += _try_files(lambda: action(file), file.path, self.files_may_fail)
            if self.warnings:
                self.file = None

    def _take_over(self, file: ResponseFile, prompts: dict[str, Prompt]) -> None:
        records, self.replaced = file.open(set(prompts))
        if records:
            log.info("%s: %d of %d responses are there already", file.path, len(records), len(prompts))
            self._judge_anew(file, records, prompts)

    def _judge_anew(self, file: ResponseFile, records: dict[str, dict[str, Any]], prompts: dict[str, Prompt]) -> None:
        """Verifies the responses of an earlier attempt again, and writes down what has changed."""
        verdicts = self.pool.score([Case.of(prompts[key], record["response"]) for key, record in records.items()])
        judged = {
            key: {**record, "uid": prompts[key].uid, "answer": prompts[key].answer, **_verdict(verdict)}
            for (key, record), verdict in zip(records.items(), verdicts, strict=True)
        }
        self.verdicts_changed = sum(judged[key]["score"] != record["score"] for key, record in records.items())
        self.judged = {key: judged_response(record) for key, record in judged.items()}
        if judged != records:
            if self.verdicts_changed and not self.replaced:
                file.keep_old()
            file.rewrite(list(judged.values()))

    def add(self, rollouts: list[Rollout], keys: list[str]) -> None:
        """Verifies and saves new responses."""
        texts = [response_text(r, self.tokenizer) for r in rollouts]
        cases = [Case.of(rollout.prompt, text) for rollout, text in zip(rollouts, texts, strict=True)]
        records: list[dict[str, Any]] = []
        k = self.eval_set.config.responses_per_prompt
        for rollout, key, text, verdict in zip(rollouts, keys, texts, self.pool.score(cases), strict=True):
            records.append(
                {
                    "set": self.eval_set.config.name,
                    "uid": rollout.prompt.uid,
                    "sample": rollout.index % k,
                    **_verdict(verdict),
                    "answer": rollout.prompt.answer,
                    "length": len(rollout),
                    "truncated": rollout.end_reason == END_LENGTH,
                    "prompt": rollout.prompt.text,
                    "response": text,
                    "policy_version": rollout.policy_version,
                    "key": key,
                }
            )
        self._with_file(lambda file: file.append(records))
        self.judged |= {record["key"]: judged_response(record) for record in records}

    def summary(self) -> tuple[dict[str, float], list[str], list[str]]:
        """The set's numbers, the responses that no verdict was reached on, and files that failed."""
        judged = list(self.judged.values())
        problems = [f"prompt {a.uid}, sample {a.sample}: {a.problem}" for a in judged if a.problem is not None]
        numbers = summarize(judged, self.eval_set.config.responses_per_prompt, self.settings.seed)
        numbers |= {"too_long": self.eval_set.prompts.too_long, "beyond_limit": self.eval_set.prompts.beyond_limit}
        numbers |= {"replaced": self.replaced, "verdicts_changed": self.verdicts_changed}
        return numbers, problems, self.warnings

    def close(self) -> None:
        """Ends the verifier's processes."""
        self.pool.close()


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "correct": verdict.correct,
        "score": verdict.score,
        "extracted": verdict.extracted,
        "problem": verdict.problem,
    }


def _write_summary(path: Path, value: dict[str, Any]) -> None:
    """Writes it, and keeps a summary of other numbers beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        other = json.loads(path.read_text(encoding="utf-8")).get("accuracy") != value["accuracy"]
    except (OSError, ValueError, AttributeError):  # none, or what is no summary
        other = False
    if other:
        os.replace(path, old_name(path))
    write_whole(path, [json.dumps(value, indent=1) + "\n"])
