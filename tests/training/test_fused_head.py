"""Whole training steps whose output layer is fused with the loss: the same as tests/reference_step.py, which is to say
as the steps with whole logits, in loss, gradient norm and updated parameters."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from megatron_opd.config import ConfigError, parse_config
from megatron_opd.kernels import set_kernels
from megatron_opd.models.headless import head_parameter, without_head
from megatron_opd.training.setup import init_distributed
from tests.distributed import run_distributed
from tests.layouts import student_model
from tests.models.tiny_families import make
from tests.reference_step import run
from tests.training.test_step import CUT, PAPER, Case, answers, megatron_steps

SAMPLED = replace(PAPER, kind="sampled_reverse_kl")
CASES = {
    "dp4": Case("tp1", "tp1", tokens=4096, settings=PAPER),
    "dp4 tied, distributed optimizer": Case(
        "tp1", "tp1", model="qwen3_tied", tokens=60, settings=PAPER, distributed_optimizer=True
    ),
    "tp2": Case("tp2", "tp1", settings=SAMPLED),
    "tp2 sp": Case("tp2_sp", "tp2_sp", settings=PAPER),
    "pp2 cut recomputed": Case("pp2", "tp1", settings=CUT, cut="reliability", recompute="full", tokens=64),
    "tp2 pp2 tied": Case("tp2_sp_pp2", "tp1", model="qwen3_tied", settings=PAPER),
    "vpp2": Case("vpp2", "tp2", settings=PAPER, tokens=64),
}
CASES = {name: replace(case, fused_head=True) for name, case in CASES.items()}
MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "c.jsonl"}}
WHOLE = "dp4, whole logits"  # of the same model and settings as "dp4"


def steps(rank: int, world: int, references: dict, directories: dict[str, str]):
    found = {name: megatron_steps(case, references[name], directories) for name, case in CASES.items()}
    found[WHOLE] = megatron_steps(replace(CASES["dp4"], fused_head=False), references["dp4"], directories)
    found["no logits"] = shapes(directories["qwen3_tied"])
    found["refused"] = refused()
    return found


def refused() -> str:
    """What setting up a run without a GPU says to `loss.kernels: triton`."""
    os.environ.pop("TRITON_INTERPRET", None)
    config = parse_config({**MODELS, "device": "cpu", "loss": {"kernels": "triton"}})
    try:
        init_distributed(config)
    except ConfigError as error:
        return str(error)
    finally:
        set_kernels("auto")
    return ""


def shapes(directory: str) -> dict:
    """What the model returns inside and after `without_head`, and that its head is the embedding's parameter."""
    with student_model(directory, "tp2_sp") as model:
        tokens = torch.arange(8)
        row, _ = model.row([8])
        with torch.no_grad():
            before = model.chunks[0](tokens[None], None, None, packed_seq_params=row)
            with without_head(model):
                hidden = model.chunks[0](tokens[None], None, None, packed_seq_params=row)
            after = model.chunks[0](tokens[None], None, None, packed_seq_params=row)
        tied = head_parameter(model) is model.chunks[0].embedding.word_embeddings.weight
        return {"hidden": hidden.shape, "same": torch.equal(before, after), "logits": after.shape, "tied": tied}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {family: str(make(family, root / family)) for family in ("qwen3", "qwen3_tied")}
    made["teacher"] = str(make("qwen3", root / "teacher", hidden_size=48, num_hidden_layers=2, intermediate_size=80))
    return made


@pytest.fixture(scope="module")
def references(directories):
    done: dict[tuple, object] = {}
    found = {}
    for name, case in CASES.items():
        key = (case.model, str(case.settings))
        if key not in done:
            done[key] = run(directories[case.model], directories["teacher"], answers(case.answers), case.settings)
        found[name] = done[key]
    return found


@pytest.fixture(scope="module")
def results(references, directories):
    return run_distributed(4, steps, references, directories, fresh=True)


@pytest.mark.parametrize("name", CASES)
def test_steps_with_a_fused_head_equal_the_reference(name, results, references):
    expected = references[name]
    for found in (r[name] for r in results):
        assert found["applied"] == [True, True]
        assert found["losses"] == pytest.approx(expected.losses, rel=1e-4)
        assert found["grad_norms"] == pytest.approx(expected.grad_norms, rel=1e-4)
        for parameter, value in found["parameters"].items():
            reference = expected.parameters[parameter]
            assert float((value - reference).norm() / reference.norm()) < 2e-5, parameter


def test_the_step_is_that_of_whole_logits(results):
    whole, fused = results[0][WHOLE], results[0]["dp4"]
    assert fused["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert fused["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-5)
    for name, value in fused["parameters"].items():
        torch.testing.assert_close(value, whole["parameters"][name], rtol=1e-4, atol=1e-6)


def test_the_model_gives_hidden_states_and_then_logits_again(results):
    for found in (r["no logits"] for r in results):
        assert tuple(found["hidden"]) == (1, 4, 32) and tuple(found["logits"]) == (1, 8, 64)  # 101 ids, two shards
        assert found["same"] and found["tied"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss": {"kind": "full_reverse_kl", "fused_head": True}, "score": {"mode": "fused"}}, "set loss.fused_head"),
        ({"loss": {"fused_head": True}, "score": {"mode": "fused"}}, "loss.fused_head: true works with score.mode"),
        ({"loss": {"kernels": "cuda"}}, "loss.kernels"),
    ],
)
def test_what_a_fused_head_cannot_do_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({**MODELS, **changes})


def test_a_run_says_at_its_start_that_triton_cannot_run(results):
    for found in (r["refused"] for r in results):
        assert "loss.kernels: triton cannot run on cpu" in found and "set auto or torch" in found
