"""Sequences that models or vLLM are not made for are refused before a model is loaded, with what would work."""

from __future__ import annotations

import json

import pytest

from megatron_opd.config import Config, ConfigError
from megatron_opd.data.prompts import PromptSet
from megatron_opd.rollout.limits import check_lengths, positions_of
from megatron_opd.types import Prompt
from megatron_opd.weights.bridge import read_hf_config

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 4096}


@pytest.fixture
def model(tmp_path):
    """Writes a config of so many positions and returns its directory."""

    def write(name: str, positions: int, **keys) -> str:
        directory = tmp_path / name
        directory.mkdir()
        config = {"model_type": "qwen2", "max_position_embeddings": positions, "num_attention_heads": 4, **keys}
        (directory / "config.json").write_text(json.dumps(config))
        return str(directory)

    return write


def config(student: str, teacher: str, **sections) -> Config:
    budget = {"initial": 200, "minimum": 100, "maximum": 400}
    values = {"student": {"model": student}, "teacher": {"model": teacher}, "prune": {"budget": budget}}
    return Config(run_dir="r", data={"prompts": "p", "max_prompt_tokens": 200}, **values, **sections)


def prompts(longest: int) -> PromptSet:
    return PromptSet("p", [Prompt(0, "", [1] * 7), Prompt(1, "", [1] * longest)], 2, 0, 0)


def refusal(settings: Config, *lengths) -> str:
    with pytest.raises(ConfigError) as refused:
        check_lengths(settings, *lengths)
    return str(refused.value)


def test_positions_of_either_model(model):
    enough, short = model("enough", 450), model("short", 449)
    check_lengths(config(enough, enough), prompts(50), [])
    for settings, key in ((config(enough, short), "teacher"), (config(short, enough), "student")):
        text = refusal(settings, prompts(50), [])
        assert f"{key}.model: {short} has 449 positions" in text and len(text.splitlines()) == 1
        assert "(50 tokens) and prune.budget.maximum: 400 need 450; lower prune.budget.maximum to 399" in text


def test_a_teacher_with_prompts_of_its_own(model):
    settings = config(model("enough", 450), model("short", 499))
    long = PromptSet("p", [Prompt(0, "", [1] * 50, own_teacher_tokens=[1] * 100)], 1, 0, 0)
    text = refusal(settings, long, [])
    assert "teacher.model" in text and "data.prompts (100 tokens)" in text and len(text.splitlines()) == 1


def test_evaluation_needs_the_student_alone(model):
    long, short = model("long", 1000), model("short", 500)
    check_lengths(config(long, short), None, [("aime", 900, prompts(100))])
    text = refusal(config(short, long), None, [("aime", 900, prompts(100)), ("math", 400, prompts(100))])
    assert "eval set aime (100 tokens) and its max_tokens: 900 need 1000; lower its max_tokens to 400" in text
    assert "math" not in text


def test_scaled_rope_reaches_further(model):
    assert positions_of(read_hf_config(model("plain", 4096))) == 4096
    assert positions_of(read_hf_config(model("yarn", 4096, rope_parameters=YARN))) == 16384
    assert positions_of(read_hf_config(model("told", 20000, rope_parameters=YARN))) == 20000
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert positions_of(read_hf_config(model("linear", 4096, rope_parameters=linear))) == 8192


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({}, r"data.max_prompt_tokens: 200 and the longest response make 600 tokens.*has 512 .*longest prompt has 50"),
        ({"vllm": {"max_model_len": 513}}, r"rollout.vllm.max_model_len: 513 is more than the 512 positions"),
        (
            {"vllm": {"max_model_len": 449}},
            r"rollout.vllm.max_model_len: 449 is less than the 450 tokens .* data.prompts \(50\)",
        ),
        (
            {"vllm": {"max_model_len": 450, "tensor": 3}},
            r"rollout.vllm.tensor: 3 does not divide the 4 attention heads",
        ),
    ],
)
def test_what_vllm_is_started_with(model, rollout, message):
    student, teacher = model("student", 512), model("teacher", 4096)
    with pytest.raises(ConfigError, match=message):
        check_lengths(config(student, teacher, rollout={"engine": "vllm", **rollout}), prompts(50), [])
    fits = {"engine": "vllm", "vllm": {"max_model_len": 450, "tensor": 2}}
    check_lengths(config(student, teacher, rollout=fits), prompts(50), [])
    check_lengths(config(student, teacher), prompts(50), [])  # the Megatron engine reserves nothing
    servers = {"mode": "server", "servers": ["http://n1:8100"]}  # have the model's own positions
    check_lengths(config(student, teacher, rollout={"engine": "vllm", "vllm": servers}), prompts(50), [])
