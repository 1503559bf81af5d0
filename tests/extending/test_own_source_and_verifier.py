"""The data source and the verifier of docs/extending, in real runs: in flight with GRPO past the drift point by the
command line, from a folder that the package has never heard of; separate and fused scoring in shared processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_opd.config import DataConfig
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.sources import DataError
from megatron_opd.data.tokenizer import load_tokenizer
from tests.distributed import run_distributed
from tests.extending.own_source import sums
from tests.tiny_run import Case, TinyRun, run_cases

HERE = Path(__file__).parent
GRPO = (
    "prune.preset=in_flight",
    "prune.w_drop=0.2",
    "prune.segment=4",
    "prune.after_drift=grpo",
    "prune.grpo_share=1",
)
ALIKE = ("teacher.parallel={tensor: 2, sequence: true}",)


def config(folder: Path, module: str) -> TinyRun:
    source, verifier = f"{module}own_source:sums", f"{module}own_verifier:number"
    evaluation = {"name": "sums", "prompts": source, "verifier": verifier, "max_tokens": 12, "limit": 6, "seed": 7}
    return TinyRun(
        folder,
        data={"prompts": source, "template": "none", "size": 20, "seed": 3, "verifier": verifier},
        eval={
            "sets": [{**evaluation, "temperature": 1.0, "responses_per_prompt": 4}],
            "every": 0,
            "verifier_workers": 1,
        },
        train={"steps": 2, "warmup_steps": 0},
        checkpoint={"every": 0},
    )


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("own")
    for name in ("own_source.py", "own_verifier.py"):
        shutil.copy(HERE / name, folder)
    run = config(folder, "")
    path = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}
    assert run.train(*GRPO, **path) == 0, run.output()
    return run


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    config(folder, "tests.extending.")
    cases = [
        Case("separate"),
        Case("fused", ("score.mode=fused", *ALIKE)),
        Case("in_flight", GRPO),
        Case("in_flight_lenient", (*GRPO, f"data.verifier={__name__}:any_number")),
    ]
    for outcome in run_distributed(2, run_cases, folder, cases)[0]:
        assert not outcome.error, outcome.said
    return folder


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def responses(run: Path) -> list[dict]:
    (path,) = (run / "eval").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_score(response: str, answer: str) -> float:
    """The verifier of the page, written down a second time."""
    digits = "".join(c if c.isdigit() else " " for c in response).split()
    if digits and digits[0] == answer:
        return 1.0
    return 0.25 if digits and int(digits[0]) < 199 else 0.0


def check_evaluation(run: Path) -> None:
    drawn = list(sums(6, seed=7))
    answers = {row["prompt"]: row["answer"] for row in drawn}
    found = responses(run)
    assert len(found) == 6 * 4
    for record in found:
        assert record["prompt"] in answers
        assert record["score"] == expected_score(record["response"], answers[record["prompt"]])
    assert any(record["score"] == 0.25 for record in found), "no partial credit: the test shows nothing"


def test_both_work_by_the_command_line_from_a_folder_of_ones_own(by_command):
    assert len(metrics(by_command.run_dir)) == 2
    check_evaluation(by_command.run_dir)


@pytest.mark.parametrize("name", ["separate", "fused", "in_flight"])
def test_both_work_with_every_way_of_scoring(name, in_one_go):
    check_evaluation(in_one_go / name)


def any_number(response: str, answer: str, metadata: dict) -> float:
    return float(any(c.isdigit() for c in response[:5]))


def test_training_learns_from_the_verifiers_reward_past_the_drift_point(in_one_go):
    own, lenient = metrics(in_one_go / "in_flight"), metrics(in_one_go / "in_flight_lenient")
    assert own[0]["tokens_generated"] == lenient[0]["tokens_generated"]  # the same responses
    assert own[0]["grad_norm"] != lenient[0]["grad_norm"]  # judged differently


def tokenizer(tmp_path: Path):
    config(tmp_path, "")
    return load_tokenizer(tmp_path / "tokenizer.model")


def test_size_and_seed_choose_the_rows(tmp_path):
    data = DataConfig(prompts="tests.extending.own_source:sums", template="none", size=5, seed=1)
    found = load_prompts(data, tokenizer(tmp_path)).prompts
    assert [(p.text, p.answer, p.source) for p in found] == [
        (row["prompt"], row["answer"], "sums") for row in sums(5, 1)
    ]
    other = load_prompts(data.model_copy(update={"seed": 2}), tokenizer(tmp_path)).prompts
    assert [p.text for p in other] != [p.text for p in found]


def endless(size: int, seed: int):
    while True:
        yield {"question": "1 + 1 = ", "expected_answer": 2}


def failing(size: int, seed: int):
    yield {"prompt": "1 + 1 = ", "answer": "2"}
    raise OSError("the database is gone")


def of_texts(size: int, seed: int):
    return ["1 + 1 = "]


def test_a_source_may_be_endless_and_its_columns_are_found(tmp_path):
    found = load_prompts(DataConfig(prompts=f"{__name__}:endless", template="none", size=3), tokenizer(tmp_path))
    assert (len(found), found.prompts[0].answer) == (3, "2")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:rows", "prompts: no_such_module:rows: cannot import no_such_module"),
        (f"{__name__}:rows", "has no rows"),
        (f"{__name__}:failing", "failed after 1 rows: OSError: the database is gone"),
        (f"{__name__}:of_texts", "item 1: must be an object with the prompt's columns, found text"),
    ],
)
def test_a_source_that_does_not_work_is_explained(source, message, tmp_path):
    with pytest.raises(DataError, match=re.escape(message)):
        load_prompts(DataConfig(prompts=source, template="none", size=3), tokenizer(tmp_path))


def test_a_file_with_a_colon_in_its_name_is_still_a_file(tmp_path):
    with pytest.raises(DataError, match="data:train: no such file"):
        load_prompts(DataConfig(prompts="./data:train", template="none"), tokenizer(tmp_path))
