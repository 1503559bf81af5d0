"""Recorded responses: what a run has sampled and what both models say of it, bounded in size, whole after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_opd.config import TrainConfig, parse_config
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.prune.signals import make_signal
from megatron_opd.records.lines import read_objects, read_steps
from megatron_opd.records.positions import position_profile
from megatron_opd.records.reading import read_responses, recorded
from megatron_opd.records.responses import ResponseRecorder, TokenTexts
from megatron_opd.scoring.prune_weights import assign_prune_weights
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores
from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases

TEACHERS = Teachers({"teacher": None}, {})  # type: ignore[dict-item]
CONFIG = parse_config(
    {
        "student": {"model": "a"},
        "teacher": {"model": "b"},
        "data": {"prompts": "p.jsonl"},
        "prune": {"k": 2, "threshold": 0.6, "w_drop": 0.5, "w_base": 0.0},
    }
)


def scored(overlaps: list[list[float]], measured: int | None = None) -> ScoredBatch:
    """Responses whose tokens are 20, 21, ..., with these overlaps."""
    rollouts, scores = [], []
    for i, overlap in enumerate(overlaps):
        n = len(overlap)
        read = n if measured is None else min(n, measured)
        ids, own = torch.arange(20, 20 + n), torch.linspace(-1, -2, n)
        table = torch.stack([ids, ids + 1], dim=1)
        logprobs = torch.stack([own, own - 0.5], dim=1)
        rollouts.append(Rollout(Prompt(i, f"prompt {i}", [4], "42"), i, ids, own, table, logprobs, "length", 7))
        columns = {"overlap": torch.tensor(overlap[:read])}
        scores.append(TeacherScores(logprobs - 0.25, own - 0.25, columns, read))
    return assign_prune_weights(rollouts, scores, CONFIG.prune, make_signal(CONFIG.prune))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    run = TinyRun(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(run.folder / "student")


def test_a_record_says_what_both_models_say(tmp_path: Path, tokenizer) -> None:
    batch = scored([[1, 0.5, 1, 0, 1], [1, 1]], measured=4)
    ResponseRecorder(str(tmp_path), TrainConfig(record_responses=2), tokenizer, TEACHERS).record(
        3, batch, make_signal(CONFIG.prune)
    )
    ((step, path),) = recorded(tmp_path / "responses").items()
    whole = read_responses(path)
    assert whole is not None and step == whole["step"] == 3
    first, second = whole["responses"]
    assert (first["prompt"], first["answer"], first["end_reason"], first["policy_version"]) == (
        "prompt 0",
        "42",
        "length",
        7,
    )
    assert first["ids"] == [20, 21, 22, 23, 24] and first["length"] == 5 and second["length"] == 2
    assert first["overlap"] == [1, 0.5, 1, 0] and len(first["teacher_logprobs"]) == 4  # the last was not read
    assert first["drift"] == [1, 3] and first["events"] == 2
    assert first["weight"] == [1, 0.5, 0.5, 0, 0] and first["effective_length"] == 3
    assert first["logprobs"] == [-1, -1.25, -1.5, -1.75, -2] and first["teacher_logprobs"][1] == -1.5
    assert first["candidates"][0] == [20, 21] and first["candidate_teacher"][0] == [-1.25, -1.75]
    assert whole["tokens"]["20"] == tokenizer.decode([20])


def test_texts_of_single_tokens_make_the_text(tokenizer) -> None:
    text = "the quick brown fox 12 + 3 = "
    texts = TokenTexts(tokenizer)
    assert "".join(texts[i] for i in tokenizer.encode(text)).strip() == text.strip()
    assert texts[3] == "</s>" and texts[10_000] == "<10000>"  # a control piece; what is no id at all


def test_the_bound_keeps_steps_spread_over_the_run(tmp_path: Path, tokenizer) -> None:
    recorder = ResponseRecorder(str(tmp_path), TrainConfig(record_responses=1), tokenizer, TEACHERS)
    signal, batch = make_signal(CONFIG.prune), scored([[1.0] * 30])
    recorder.record(1, batch, signal)
    size = recorded(tmp_path / "responses")[1].stat().st_size
    recorder.bytes = int(size * 8.5)
    for step in range(2, 41):
        recorder.record(step, batch, signal)
        files = recorded(tmp_path / "responses")
        assert sum(path.stat().st_size for path in files.values()) <= recorder.bytes
    steps = list(files)
    assert 4 <= len(steps) <= 8 and steps[0] == 1 and {b - a for a, b in zip(steps, steps[1:])} == {8}
    again = ResponseRecorder(str(tmp_path), TrainConfig(record_responses=1), tokenizer, TEACHERS)
    again.drop_from(34)
    assert list(recorded(tmp_path / "responses")) == [step for step in steps if step < 34]
    for step in range(34, 41):
        again.record(step, batch, signal)
    assert list(recorded(tmp_path / "responses")) == steps  # as if it had not been interrupted


@pytest.mark.parametrize("content", [b"", b"{}", b"\x1f\x8bnothing", b"[" * 100_000])
def test_a_torn_file_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_000001.json.gz"
    path.write_bytes(content)
    assert read_responses(path) is None


def test_positions_count_tokens_events_and_ends() -> None:
    profile = position_profile(scored([[1, 0.5, 1, 0, 1], [1, 1]]), make_signal(CONFIG.prune), 4800)
    assert profile == {"width": 100, "tokens": [7], "events": [2], "spent": [1], "overlap": [round(5.5 / 7, 4)]}
    fine = position_profile(scored([[1, 0.5, 1, 0, 1], [1, 1]]), make_signal(CONFIG.prune), 40)
    assert fine["width"] == 1 and fine["tokens"] == [2, 2, 1, 1, 1] and fine["events"] == [0, 1, 0, 1, 0]
    assert fine["spent"] == [0, 0, 0, 1, 0] and fine["overlap"] == [1, 0.75, 1, 0, 1]


PASSES = {
    "paper": (),
    "in_flight": ("prune.preset=in_flight",),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "fused": ("score.mode=fused", "student.parallel={}", "teacher.parallel={}"),
    "hidden": ("score.payload=hidden", "loss.kind=full_reverse_kl"),
    "off": ("prune.preset=off",),
    "grpo": ("prune.preset=in_flight", "prune.after_drift=grpo", "prune.grpo_share=0.5", "data.verifier=exact"),
    "none": ("train.record_responses=0",),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("records"), train={"steps": 3}, checkpoint={"every": 1, "keep_last": 9})
    cases = [Case(name, overrides) for name, overrides in PASSES.items()]
    later = [Case("resumed", resumes=("paper", 2))]
    for group in (cases, later):
        outcomes = run_distributed(2, run_cases, run.folder, group)[0]
        assert [o.error for o in outcomes] == [""] * len(group)
    return run


@pytest.mark.parametrize("name", PASSES)
def test_every_scoring_pass_records(runs: TinyRun, name: str) -> None:
    folder = runs.folder / name
    files = recorded(folder / "responses")
    steps = read_steps(folder / "metrics.jsonl")
    profiles = read_steps(folder / "positions.jsonl")
    assert [p["step"] for p in profiles] == [1, 2, 3]
    assert not any("warning" in step for step in steps)
    if name == "none":
        assert not files
        return
    assert list(files) == [1, 2, 3]
    for step, profile, path in zip(steps, profiles, files.values(), strict=True):
        responses = read_responses(path)["responses"]  # type: ignore[index]
        assert len(responses) == 4  # the whole batch
        assert sum(r["length"] for r in responses) == step["tokens_kept"]
        assert sum(r["events"] for r in responses) / 4 == step["events_mean"]
        assert sum(r["effective_length"] for r in responses) / 4 == step["effective_length_mean"]
        assert sum(profile["events"]) == sum(len(r["drift"]) for r in responses) == sum(r["events"] for r in responses)
        read = sum(len(r["teacher_logprobs"]) for r in responses)
        assert sum(profile["tokens"]) == read <= step["tokens_kept"]
        rewarded = [r["reward"] for r in responses if r["reward"] is not None]
        assert bool(rewarded) == (name == "grpo")
        if step["overlap_mean"] is not None:
            known = [v for r in responses for v in r["overlap"]]
            assert sum(known) / len(known) == pytest.approx(step["overlap_mean"], abs=1e-3)


def test_a_resumed_run_records_what_the_uninterrupted_one_has(runs: TinyRun) -> None:
    whole, resumed = runs.folder / "paper", runs.folder / "resumed"
    assert read_responses(resumed / "responses" / "step_000003.json.gz") == read_responses(
        whole / "responses" / "step_000003.json.gz"
    )
    assert read_steps(resumed / "positions.jsonl") == read_steps(whole / "positions.jsonl")[2:]


def test_every_start_leaves_a_line(runs: TinyRun) -> None:
    (line,) = read_objects(runs.folder / "resumed" / "starts.jsonl")
    assert line["step"] == 3 and line["processes"] == 2 and line["device"] == "cpu" and line["version"]
    assert json.dumps(line).count("/") == 0  # no paths
