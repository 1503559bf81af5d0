"""Every data set of reasoning-gym through the files that people keep its entries in: reference answers score 1."""

from __future__ import annotations

import copy
import json

import pyarrow
import pyarrow.parquet
import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from megatron_opd.config import DataConfig
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.sources import UNANSWERED_GYM_SETS
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.evaluation.verifiers import Case, VerifierPool
from tests.data.make_tokenizers import make_hugging_face

NAMES = sorted(set(DATASETS) - {"composite"})  # that one is made of others
IN_METADATA = ("possible_answer", "example_answer", "example_correct_answer")  # where the entry itself has no answer
UNSOLVED = {"boxnet": "{}", "rush_hour": "A+1"}  # nowhere a solution: an attempt that is worth a little


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_hugging_face(tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("reasoning_gym", timeout_s=120) as pool:
        yield pool


def rows_of(entry: dict, name: str) -> list[dict]:
    """The layouts: the entry as it is, the whole entry as metadata, both as text of JSON."""
    flat = {"question": entry["question"], "answer": entry["answer"], "source": f"reasoning_gym:{name}"}
    return [
        entry,
        {**flat, "metadata": entry},
        {**flat, "metadata": json.dumps(entry)},
        {**flat, "metadata": json.dumps(entry["metadata"])},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_reference_answers_score_1_after_a_round_trip(name, pool, tokenizer, tmp_path):
    entry = copy.deepcopy(create_dataset(name, seed=11, size=2)[1])
    answer = entry["answer"]
    if answer is None:
        found = [entry["metadata"][key] for key in IN_METADATA if key in entry["metadata"]]
        answer = UNSOLVED[name] if not found else found[0] if isinstance(found[0], str) else json.dumps(found[0])
    rows = rows_of(entry, name)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "p.jsonl")]
    for i, row in enumerate(rows):
        try:
            table = pyarrow.Table.from_pylist([row])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # no column holds lists of a text and a number
            assert i < 2
            continue
        files.append(str(tmp_path / f"p{i}.parquet"))
        pyarrow.parquet.write_table(table, files[-1])
    cases = [Case(f"<answer>{answer}</answer>", entry["answer"] or "", entry, f"reasoning_gym:{name}")]
    for file in files:
        data = DataConfig(prompts=file, prompt_key="question", max_prompt_tokens=1_000_000)
        found = load_prompts(data, tokenizer, verifier="reasoning_gym").prompts
        cases += [Case.of(prompt, f"so <answer>{answer}</answer>") for prompt in found]
    assert len(cases) >= 7
    expected = 1.0 if name not in UNSOLVED else create_dataset(name, seed=11, size=2).score_answer(answer, entry)
    assert expected > 0
    assert [(v.score, v.problem) for v in pool.score(cases)] == [(expected, None)] * len(cases)


def test_the_data_sets_without_reference_answers_are_known():
    assert {n for n in NAMES if create_dataset(n, seed=0, size=1)[0]["answer"] is None} == UNANSWERED_GYM_SETS


def test_wrong_answers_stay_wrong(pool):
    entry = json.loads(json.dumps(create_dataset("arc_agi", seed=3, size=1)[0]))
    other = "\n".join(line[::-1] for line in entry["answer"].splitlines()) + " 9"
    (verdict,) = pool.score([Case(f"<answer>{other}</answer>", entry["answer"], entry["metadata"], "arc_agi")])
    assert verdict.score < 1 and verdict.problem is None
