"""Prompt files of every layout, templates, filters, and each way in which a file can be wrong."""

from __future__ import annotations

import math
import sys
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.config import DataConfig, EvalSetConfig
from megatron_opd.data.prompts import load_eval_prompts, load_prompts
from megatron_opd.data.sources import DataError
from megatron_opd.data.tokenizer import TokenizerError
from tests.data.conftest import GOOD, plain

DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 1+2?"}],
    "reward_model": {"ground_truth": "3", "style": "rule"},
    "extra_info": {"index": "9a9b"},
}


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize(
    ("row", "expected", "note"),
    [
        ({"prompt": "1+2?", "answer": "3", "source": "own"}, ("1+2?", "3", "own"), ""),
        (DAPO, ("What is 1+2?", "3", "math_dapo"), "took reward_model.ground_truth"),
        ({"ID": "2024-I-1", "Problem": "1+2?", "Solution": "Add.", "Answer": 3}, ("1+2?", "3", ""), "took Problem"),
        ({"id": 60, "problem": "1+2?", "solution": "Add.", "answer": "003"}, ("1+2?", "003", ""), "took problem"),
        ({"id": 0, "question": "1+2?", "answer": 3.0, "url": "x"}, ("1+2?", "3", ""), "took question"),  # AMC23
        ({"problem_idx": 1, "problem": "1+2?", "answer": "\\frac{6}{2}"}, ("1+2?", "\\frac{6}{2}", ""), "took problem"),
    ],
    ids=["ours", "dapo", "aime24", "aime", "amc", "hmmt"],
)
def test_public_columns_are_recognised_and_reported(write, sp, name, row, expected, note):
    found = load_prompts(plain(write(row, name=name)), sp, need_answers=True)
    (prompt,) = found.prompts
    assert (prompt.text, prompt.answer, prompt.source) == expected
    assert prompt.tokens == sp.encode(expected[0], start=True)
    assert note in found.summary()
    assert bool(found.notes) == bool(note)


def test_configured_keys_go_first_and_reach_into_objects(write, sp):
    row = {"prompt": "no", "task": {"text": "yes"}, "answer": "1", "gold": {"a": {"b": "2"}}, "a.b": "set"}
    data = plain(write(row), prompt_key="task.text", answer_key="gold.a.b", source_key="a.b")
    (prompt,) = load_prompts(data, sp).prompts
    assert (prompt.text, prompt.answer, prompt.source) == ("yes", "2", "set")


def test_uid_is_the_position_in_the_file(write, sp):
    path = write({"prompt": "1"}, "", {"prompt": "2"}, {"prompt": "3"})
    assert [p.uid for p in load_prompts(plain(path), sp).prompts] == [0, 2, 3]


def test_chat_prompts_take_system_suffix_and_thinking(write, hf):
    path = write({"prompt": "1+2?"}, {"prompt": [{"role": "system", "content": "own"}, *DAPO["prompt"]]})
    data = DataConfig(prompts=path, system="Be brief.", suffix=" Box it.", thinking=False)
    first, second = load_prompts(data, hf).prompts
    assert first.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+2? Box it.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert first.tokens[0] == 1 and first.tokens.count(2) == 2  # template marks become single ids
    assert second.text.startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nWhat is 1+2? Box it.")


def test_plain_prompts_take_the_suffix(write, sp):
    path = write({"prompt": "1+2?"}, DAPO)
    assert [p.text for p in load_prompts(plain(path, suffix="!"), sp, None).prompts] == ["1+2?!", "What is 1+2?!"]


def test_long_prompts_are_left_out_and_counted(write, sp):
    path = write({"prompt": "1"}, {"prompt": "1" * 50}, {"prompt": "2"})
    found = load_prompts(plain(path, max_prompt_tokens=10), sp)
    assert ([p.uid for p in found.prompts], found.too_long, found.total) == ([0, 2], 1, 3)
    assert "2 of 3 prompts, 1 too long" in found.summary()
    with pytest.raises(
        DataError, match="all 3 prompts are longer than max_prompt_tokens: 1; the shortest has 2 tokens"
    ):
        load_prompts(plain(path, max_prompt_tokens=1), sp)


def test_duplicates_are_counted_and_dropped_on_request(write, sp):
    path = write({"prompt": "1"}, {"prompt": "2"}, {"prompt": "1"}, {"prompt": "1"})
    kept = load_prompts(plain(path), sp)
    assert (len(kept), kept.duplicates) == (4, 2) and "2 duplicates (kept)" in kept.summary()
    dropped = load_prompts(plain(path, duplicates="drop"), sp)
    assert ([p.uid for p in dropped.prompts], dropped.duplicates) == ([0, 1], 2)


def test_metadata_reaches_the_prompt(write, sp):
    first, second = load_prompts(plain(write({"prompt": "1", "metadata": {"x": [1]}}, {"prompt": "2"})), sp).prompts
    assert (first.metadata, second.metadata) == ({"x": [1]}, {})


def test_fingerprint_follows_the_content(write, sp):
    def fingerprint(*rows, **changes):
        return load_prompts(plain(write(*rows), **changes), sp).fingerprint

    base = fingerprint({"prompt": "1", "answer": "2"}, {"prompt": "3", "answer": "4"})
    assert base == fingerprint({"answer": "2", "prompt": "1"}, {"prompt": "3", "answer": "4"})
    assert base != fingerprint({"prompt": "1", "answer": "2"}, {"prompt": "3", "answer": "5"})
    assert base != fingerprint({"prompt": "3", "answer": "4"}, {"prompt": "1", "answer": "2"})
    assert base != fingerprint({"prompt": "1", "answer": "2"}, {"prompt": "3", "answer": "4"}, suffix="!")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file is empty"),
        (["", "  "], "the file is empty"),
        ([GOOD, '{"prompt": "1'], "p.jsonl: line 2: broken JSON"),
        ([GOOD, "", "[1]"], "line 3: must hold one JSON object a line, found a list"),
        ([{"text": "1", "meta": {"id": 4}}], "line 1: key 'prompt' is missing; its keys are text, meta.id"),
        ([GOOD, {"answer": "2"}], "line 2: key 'prompt' is missing; its keys are answer"),
        ([GOOD, {"prompt": "2"}], "line 2: key 'answer' is missing; its keys are prompt"),
        ([GOOD, {"prompt": "2", "answer": None}], "line 2: key 'answer' is null"),
        ([GOOD, {"prompt": "2", "answer": " "}], "line 2: key 'answer' is empty"),
        ([GOOD, {"prompt": "2", "answer": ["1"]}], "line 2: key 'answer' must be text or a number, found a list"),
        ([GOOD, {"prompt": "2", "answer": True}], "line 2: key 'answer' must be text or a number, found true/false"),
        ([{"prompt": " \n", "answer": "2"}], "line 1: key 'prompt' is empty"),
        ([{"prompt": 5, "answer": "2"}], "line 1: key 'prompt' must be text or chat messages, found a number"),
        ([{"prompt": [], "answer": "2"}], "line 1: key 'prompt' has no messages"),
        (
            [{"prompt": [{"role": "user"}], "answer": "2"}],
            "key 'prompt', message 1 must be an object with the texts role",
        ),
        ([{"prompt": [{"role": "user", "content": ""}], "answer": "2"}], "the last message is empty"),
        (
            [{"prompt": [*DAPO["prompt"], {"role": "assistant", "content": "3"}], "answer": "2"}],
            "must end with the user's message, not one of 'assistant'",
        ),
        ([{"prompt": [*DAPO["prompt"], *DAPO["prompt"]], "answer": "2"}], "2 chat messages cannot become plain text"),
    ],
)
def test_bad_files_name_the_line_the_key_and_the_problem(write, sp, rows, message):
    with pytest.raises(DataError) as error:
        load_prompts(plain(write(*rows)), sp, need_answers=True)
    assert message in str(error.value)
    assert "p.jsonl" in str(error.value)


def test_missing_answers_matter_only_where_they_are_needed(write, sp):
    path = write({"prompt": "1"}, {"prompt": "2"})
    found = load_prompts(plain(path), sp)
    assert [p.answer for p in found.prompts] == [None, None] and "have no answers" in found.summary()
    with pytest.raises(DataError, match="line 1: key 'answer' is missing; its keys are prompt"):
        load_prompts(plain(path), sp, need_answers=True)


def test_unreadable_files_are_named(tmp_path, write, sp):
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        load_prompts(plain(str(tmp_path / "none.jsonl")), sp)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="p.parquet: not a readable Parquet file"):
        load_prompts(plain(str(tmp_path / "p.parquet")), sp)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match="latin.jsonl: line 1: not UTF-8 text"):
        load_prompts(plain(str(tmp_path / "latin.jsonl")), sp)
    with pytest.raises(DataError, match="row 2: key 'prompt' is null"):
        load_prompts(plain(write({"prompt": "1"}, {"prompt": None}, name="q.parquet")), sp)


def test_template_errors_name_the_line(write, sp):
    with pytest.raises(TokenizerError, match="line 1: .* no chat template; set data.template: none"):
        load_prompts(DataConfig(prompts=write(GOOD)), sp)


def test_reasoning_gym_is_a_source(sp):
    import reasoning_gym

    data = plain("reasoning_gym:chain_sum", size=20, seed=3)
    found = load_prompts(data, sp, need_answers=True)
    assert len(found) == 20 and not found.notes
    for prompt in found.prompts:
        assert prompt.source == "reasoning_gym:chain_sum"
        assert (prompt.text, prompt.answer) == (prompt.metadata["question"], prompt.metadata["answer"])
        assert reasoning_gym.get_score_answer_fn("chain_sum")(prompt.answer, prompt.metadata) == 1.0
    assert load_prompts(data, sp).fingerprint == found.fingerprint
    other = load_prompts(data.model_copy(update={"seed": 4}), sp)
    assert not {p.text for p in other.prompts} & {p.text for p in found.prompts}
    keys = load_prompts(data.model_copy(update={"prompt_key": "a.b", "answer_key": "c.d"}), sp)
    assert keys.fingerprint == found.fingerprint
    unanswered = load_prompts(plain("reasoning_gym:graph_color", size=2), sp, need_answers=True)
    assert [p.answer for p in unanswered.prompts] == [None, None]


def test_unknown_reasoning_gym_set_gets_a_suggestion(sp):
    with pytest.raises(DataError, match="no data set 'chain_sums'; did you mean reasoning_gym:chain_sum?"):
        load_prompts(plain("reasoning_gym:chain_sums"), sp)


def test_eval_sets_take_the_rest_from_data(write, sp):
    data = plain("unused", suffix="!", prompt_key="text", max_prompt_tokens=5)
    path = write(*({"text": str(i), "answer": i} for i in range(5)), {"text": "1" * 9, "answer": 1})
    found = load_eval_prompts(EvalSetConfig(name="e", prompts=path, limit=3), data, sp)
    assert [(p.text, p.answer) for p in found.prompts] == [("0!", "0"), ("1!", "1"), ("2!", "2")]
    assert found.too_long == 1
    own = EvalSetConfig(name="e", prompts=path, suffix="", prompt_key="answer", answer_key="text")
    with pytest.raises(DataError, match="eval set e: .*line 1: key 'answer' must be text or chat messages"):
        load_eval_prompts(own, data, sp)
    gym = EvalSetConfig(name="g", prompts="reasoning_gym:chain_sum", limit=7)
    assert len(load_eval_prompts(gym, data.model_copy(update={"max_prompt_tokens": 1000}), sp)) == 7


DISGUISES = {
    "null": None,
    "NaN": math.nan,
    "empty": "",
    "blank": " \n",
    "empty list": [],
    "lists of nothing": [[None, ""], []],
    "numpy NaN": np.float32("nan"),
    "numpy text": np.str_(""),
    "numpy array": np.array([]),
    "decimal NaN": Decimal("NaN"),
}
ROWS: list[dict] = []


def rows(size: int, seed: int) -> list[dict]:
    return ROWS


@pytest.fixture
def own_rows(monkeypatch):
    """A source of rows that no file can hold."""
    monkeypatch.setattr(sys.modules[__name__], "ROWS", ROWS)
    return lambda *given: (ROWS.__setitem__(slice(None), given), f"{__name__}:rows")[1]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", [*DISGUISES, "absent"])
def test_a_missing_answer_in_any_disguise(own_rows, sp, kind, place):
    given = [{"prompt": str(i), "answer": str(i)} for i in range(3)]
    del given[place]["answer"]
    if kind in DISGUISES:
        given[place]["answer"] = DISGUISES[kind]
    source = own_rows(*given)
    found = load_prompts(plain(source), sp, need_answers=None)
    assert [p.answer for p in found.prompts] == [None if i == place else str(i) for i in range(3)]
    assert f"1 of 3 rows have no answer; the first, {source}: item {place + 1}: key 'answer' is" in found.summary()
    for need in (True, False):  # the other rows have one
        with pytest.raises(
            DataError, match=f"item {place + 1}: key 'answer' is (missing|null|NaN|empty|a list of noth)"
        ):
            load_prompts(plain(source), sp, need_answers=need)
    nowhere = own_rows(*({**given[place], "prompt": row["prompt"]} for row in given))
    assert [p.answer for p in load_prompts(plain(nowhere), sp).prompts] == [None] * 3


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize("value", [None, math.nan, ""])
def test_files_treat_missing_answers_alike(write, sp, name, value):
    kind = float if isinstance(value, float) else str
    given = [{"problem": "a", "Answer": value}, *({"problem": f"q{i}", "Answer": kind(i)} for i in (1, 2))]
    path = write(*given, name=name)
    found = load_prompts(plain(path), sp, need_answers=None)
    assert [p.answer for p in found.prompts] == [None, "1", "2"]
    assert "took Answer" in found.summary() and "1 of 3 rows" in found.summary()
    with pytest.raises(DataError, match="(line|row) 1: key 'answer' is missing; its keys are problem, Answer"):
        load_prompts(plain(path), sp, need_answers=True)
    nothing = write(*({**row, "Answer": value} for row in given), name="n" + name)
    assert "have no answers" in load_prompts(plain(nothing), sp).summary()


def test_answers_of_other_types(own_rows, sp):
    values = [
        np.int64(5),
        np.float64(2.0),
        np.float32(0.5),
        np.str_("x"),
        Decimal("3.00"),
        Decimal("2.50"),
        np.array(7),
    ]
    source = own_rows(*({"prompt": str(i), "answer": value} for i, value in enumerate(values)))
    assert [p.answer for p in load_prompts(plain(source), sp, need_answers=True).prompts] == [
        *("5", "2", "0.5", "x", "3", "2.50", "7")
    ]
    several = own_rows({"prompt": "1", "answer": ["1", "2"]})
    for need in (True, False, None):  # it holds something, and that is wrong
        with pytest.raises(DataError, match="item 1: key 'answer' must be text or a number, found a list"):
            load_prompts(plain(several), sp, need_answers=need)
    (chat,) = load_prompts(plain(own_rows({"prompt": np.array([{"role": "user", "content": "a"}])})), sp).prompts
    assert (chat.text, chat.answer) == ("a", None)


def test_problems_without_reference_answers_need_the_verifier_that_reads_their_entries(sp):
    data = plain("reasoning_gym:graph_color", size=2)
    assert [p.answer for p in load_prompts(data, sp, True, "reasoning_gym").prompts] == [None, None]
    with pytest.raises(DataError, match="reasoning_gym:graph_color: item 1: key 'answer' is null"):
        load_prompts(data, sp, True, "math")
    with pytest.raises(DataError, match="reasoning_gym:composite: "):
        load_prompts(plain("reasoning_gym:composite"), sp)


def test_half_a_character_names_the_line(tmp_path, own_rows, sp):
    path = tmp_path / "p.jsonl"
    for bad, key in (
        ('{"prompt": "half \\ud83d", "answer": "1"}', "prompt"),
        ('{"prompt": [{"role": "user", "content": "\\uDE00x"}], "answer": "1"}', "prompt.content"),
        ('{"prompt": "x", "answer": "1", "metadata": {"a": ["b\\ud800"]}}', "metadata.a"),
    ):
        path.write_text('{"prompt": "a whole one: \\ud83d\\ude00", "answer": "1"}\n' + bad + "\n")
        with pytest.raises(DataError, match=rf"p.jsonl: line 2: key '{key}' holds \\u[d8]\w+, half a character"):
            load_prompts(plain(str(path)), sp)
    with pytest.raises(DataError, match="item 1: key 'prompt' holds"):
        load_prompts(plain(own_rows({"prompt": "\ud83d"})), sp)
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    with pytest.raises(DataError, match="data.suffix: holds"):
        load_prompts(plain(str(path), suffix="\ud83d"), sp)
    offsets = pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1]
    column = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"a\xf0\x9f"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="p.parquet: row 2: not UTF-8 text"):
        load_prompts(plain(str(tmp_path / "p.parquet")), sp)


def test_deeply_nested_json_is_broken_json(write, sp):
    with pytest.raises(DataError, match="line 1: broken JSON"):
        load_prompts(plain(write('{"prompt": ' + "[" * 100_000)), sp)
