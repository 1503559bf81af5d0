"""What templates and a teacher's own context make of prompts."""

from __future__ import annotations

import pytest

from megatron_opd.config import DataConfig, EvalSetConfig, TeacherConfig
from megatron_opd.data.prompts import load_eval_prompts, load_prompts
from megatron_opd.data.sources import DataError
from megatron_opd.data.tokenizer import TokenizerError, load_tokenizer
from tests.data.conftest import GOOD, plain
from tests.data.make_tokenizers import THINKING_TEMPLATE, make_hugging_face

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y, %H:%M') + '\n' }}" + THINKING_TEMPLATE


def test_templates_that_write_the_date_write_the_configured_one(tmp_path, write):
    tokenizer = load_tokenizer(make_hugging_face(tmp_path / "t", template=DATED))
    data = DataConfig(prompts=write({"prompt": "1+2?"}))
    found = load_prompts(data, tokenizer)
    assert found.prompts[0].text.startswith("Today: 26 Jul 2024, 00:00\n")
    assert "the chat template writes the date: always 2024-07-26, from data.date" in found.summary()
    other = load_prompts(DataConfig(prompts=data.prompts, date="2025-01-31"), tokenizer)
    assert other.prompts[0].text.startswith("Today: 31 Jan 2025") and other.fingerprint != found.fingerprint
    (evaluated,) = load_eval_prompts(EvalSetConfig(name="e", prompts=write(GOOD)), data, tokenizer).prompts
    assert evaluated.text.startswith("Today: 26 Jul 2024")


def test_a_template_without_a_date_says_nothing(hf, write):
    assert "writes the date" not in load_prompts(DataConfig(prompts=write({"prompt": "1"})), hf).summary()


@pytest.mark.parametrize("thinking", [True, False])
def test_a_thinking_switch_that_changes_nothing_is_refused(tmp_path, write, thinking):
    sets_it = "{%- set enable_thinking = messages|length > 1 -%}" + THINKING_TEMPLATE
    tokenizer = load_tokenizer(make_hugging_face(tmp_path / "t", template=sets_it))
    path = write(GOOD)
    with pytest.raises(
        TokenizerError, match=f"line 1: thinking: {str(thinking).lower()} changes nothing: .*enable_thi"
    ):
        load_prompts(DataConfig(prompts=path, thinking=thinking), tokenizer)
    assert load_prompts(DataConfig(prompts=path), tokenizer).prompts


def test_a_template_that_refuses_one_way_of_thinking_has_a_switch(tmp_path, write):
    template = "{%- if not enable_thinking %}{{ raise_exception('always thinks') }}{%- endif %}" + THINKING_TEMPLATE
    tokenizer = load_tokenizer(make_hugging_face(tmp_path / "t", template=template))
    assert load_prompts(DataConfig(prompts=write(GOOD), thinking=True), tokenizer).prompts
    with pytest.raises(TokenizerError, match="always thinks"):
        load_prompts(DataConfig(prompts=write(GOOD), thinking=False), tokenizer)


def test_the_teacher_alone_reads_the_context(write, hf):
    path = write(
        {"prompt": "1+2?", "answer": "3", "info": {"solution": "Add {prompt}: 3."}},
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
            "answer": "4",
            "info": {"solution": 4},
        },
    )
    teacher = TeacherConfig(
        model="t", system="You know the solution.", context_key="info.solution", context="Hint: {context}\n{prompt}"
    )
    plain_set = load_prompts(DataConfig(prompts=path, suffix=" Think."), hf)
    found = load_prompts(DataConfig(prompts=path, suffix=" Think."), hf, teachers={"": teacher})
    assert [p.tokens for p in found.prompts] == [p.tokens for p in plain_set.prompts]
    expected = ["Hint: Add {prompt}: 3.\n1+2? Think.", "Hint: 4\n2+2? Think."]
    for prompt, text in zip(found.prompts, expected):
        messages = [{"role": "system", "content": "You know the solution."}, {"role": "user", "content": text}]
        assert prompt.teacher_tokens == hf.encode(hf.chat(messages, None, DataConfig(prompts=path).date), start=False)
    assert found.fingerprint != plain_set.fingerprint  # a resumed run must not change what the teacher reads
    assert all(p.teacher_tokens == p.tokens for p in plain_set.prompts)


def test_plain_text_takes_a_context_too(write, sp):
    path = write({"prompt": "1+2=", "answer": "3", "hint": "three"})
    found = load_prompts(
        plain(path), sp, teachers={"": TeacherConfig(model="t", context_key="hint", context="{context};{prompt}")}
    )
    assert found.prompts[0].teacher_tokens == sp.encode("three;1+2=", start=True)


@pytest.mark.parametrize("value", [None, "", [], {"a": 1}])
def test_a_context_that_is_missing_is_named(value, write, sp):
    path = write({"prompt": "1+2=", "hint": "three"}, {"prompt": "2+2=", "hint": value})
    with pytest.raises(DataError, match=r"line 2.*hint \(teacher.context_key\) is missing"):
        load_prompts(plain(path), sp, teachers={"": TeacherConfig(model="t", context_key="hint")})


def test_each_sources_teacher_reads_its_own_context(write, sp):
    rows = ({"prompt": "1+2=", "source": "sums", "hint": "three"}, {"prompt": "2+2=", "source": "other"})
    teachers = {
        "": TeacherConfig(model="t"),
        "sums": TeacherConfig(model="u", context_key="hint", context="{context}:{prompt}"),
    }
    first, second = load_prompts(plain(write(*rows)), sp, teachers=teachers).prompts
    assert first.teacher_tokens == sp.encode("three:1+2=", start=True) and second.teacher_tokens == second.tokens
