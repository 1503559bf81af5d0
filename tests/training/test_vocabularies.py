"""Student and teacher with one tokenizer and embeddings padded to different sizes, as Qwen2.5's 1.5B and 7B have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.distributed import run_distributed
from tests.tiny_run import Case, Outcome, TinyRun, run_cases

PARALLEL = ("student.parallel={tensor: 2}", "teacher.parallel={tensor: 2}")
CASES = [
    Case("equal"),
    Case("wide_teacher", ("teacher.model=FOLDER/wide_teacher",)),
    Case("in_flight", ("prune.preset=in_flight",)),
    Case("wide_in_flight", ("prune.preset=in_flight", "teacher.model=FOLDER/wide_teacher")),
    Case("wide_student", ("student.model=FOLDER/wide_student",)),
    Case(
        "wide_student_vllm", ("student.model=FOLDER/wide_student", "rollout.engine=vllm", "data.max_prompt_tokens=64")
    ),
    Case("fused", ("teacher.model=FOLDER/wide_teacher", "score.mode=fused", *PARALLEL)),
    Case("narrow", ("teacher.model=FOLDER/narrow",)),
]


def resized(source: Path, to: Path, change: int) -> None:
    """A copy with so many rows more, whose logits would be the largest of all, or fewer."""
    model = Qwen3ForCausalLM.from_pretrained(source)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + change, mean_resizing=False)
    if change > 0:
        with torch.no_grad():
            for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                weight[size:] = 3 * torch.randn(change, weight.shape[1], generator=torch.Generator().manual_seed(0))
    model.save_pretrained(to)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if (source / name).exists():
            (to / name).write_bytes((source / name).read_bytes())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[TinyRun, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    run = TinyRun(folder, train={"steps": 2, "warmup_steps": 0}, checkpoint={"every": 0})
    resized(run.folder / "teacher", run.folder / "wide_teacher", 13)
    resized(run.folder / "student", run.folder / "wide_student", 13)
    resized(run.folder / "teacher", run.folder / "narrow", -20)
    outcomes = run_distributed(2, run_cases, run.folder, CASES)[0]
    return run, {case.name: outcome for case, outcome in zip(CASES, outcomes)}


@pytest.mark.parametrize("wide, equal", [("wide_teacher", "equal"), ("wide_in_flight", "in_flight")])
def test_ids_that_one_model_alone_embeds_are_padding(finished, wide, equal):
    run, outcomes = finished
    assert outcomes[wide].error == outcomes[equal].error == ""
    assert "ids from" in outcomes[wide].said and "on are padding" in outcomes[wide].said
    for ours, theirs in zip(run.metrics(run.folder / wide), run.metrics(run.folder / equal), strict=True):
        for key in ("ended", "alarms"):
            assert ours.pop(key) == theirs.pop(key)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_student_with_more_ids_trains(finished):
    run, outcomes = finished
    assert outcomes["wide_student"].error == ""
    assert [m["step"] for m in run.metrics(run.folder / "wide_student")] == [1, 2]


def test_what_cannot_work_is_refused(finished):
    _, outcomes = finished
    assert "set rollout.engine: megatron" in outcomes["wide_student_vllm"].error
    assert "their logits differ in width; set score.mode: separate" in outcomes["fused"].error
    assert outcomes["narrow"].exit_code == 2 and "embeds only" in outcomes["narrow"].error
