"""Whole training steps (teacher, judge, cut, packing, schedule, loss, clipping, AdamW) against tests/reference_step.py.

The reference is padded, uncut and masked, so agreement in the cases with `cut` is also the proof that packing and
cutting change nothing but the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from megatron_opd.config import Config, parse_config
from megatron_opd.prune.signals import make_signal
from megatron_opd.scoring.prune_weights import assign_prune_weights
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.until_spent import score_until_spent
from megatron_opd.training.clock import PhaseClock
from megatron_opd.training.setup import Trainer, build_optimizer, build_scheduler, wrap_ddp
from megatron_opd.training.step import TrainingStep
from megatron_opd.types import Prompt, Rollout
from megatron_opd.weights.export import export_parameters
from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, student_model, teacher_model
from tests.models.tiny_families import VOCAB, make
from tests.reference_step import Result, Settings, run


@dataclass
class Case:
    student: str
    teacher: str
    model: str = "qwen3"
    tokens: int = 100  # of a micro-batch
    cut: str = "none"
    settings: Settings = field(default_factory=Settings)
    answers: int = 8
    distributed_optimizer: bool = False
    recompute: str = "none"
    scoring: str = "separate"
    fused_head: bool = False


# At this threshold about half of the positions are events; an answer is spent after 20 of them.
PAPER = Settings(threshold=0.15, w_drop=0.05)
CUT = replace(PAPER, w_base=0.0)
CASES = {
    "dp4": Case("tp1", "pp2", tokens=4096, settings=PAPER),
    "dp4 distributed optimizer": Case("tp1", "tp2_sp", tokens=60, settings=PAPER, distributed_optimizer=True),
    "dp4 cut": Case("tp1", "tp1", settings=CUT, cut="reliability"),
    "dp4 two answers": Case("tp1", "pp2", settings=CUT, cut="reliability", answers=2),
    "tp2 sp": Case("tp2_sp", "pp2", settings=PAPER),
    "tp2 sp cut": Case("tp2_sp", "tp2_sp_pp2", settings=CUT, cut="reliability", tokens=200),
    "tp2 sp sampled": Case("tp2_sp", "tp1", settings=replace(PAPER, kind="sampled_reverse_kl")),
    "pp2": Case("pp2", "tp2_sp", model="qwen2", tokens=64, settings=PAPER),
    "pp2 tied": Case("pp2", "pp2", model="qwen3_tied", settings=PAPER, distributed_optimizer=True),
    "pp2 cut recomputed": Case("pp2", "tp1", settings=CUT, cut="reliability", recompute="full", tokens=64),
    "tp2 pp2 tied": Case("tp2_sp_pp2", "tp1", model="qwen3_tied", settings=PAPER),
    "tp2 pp2 cut": Case("tp2_pp2", "pp2", settings=CUT, cut="reliability", tokens=4096),
    "vpp2": Case("vpp2", "tp2", settings=PAPER, tokens=64),
    "vpp2 cut": Case("vpp2", "tp2_sp", settings=CUT, cut="reliability", tokens=64),
    "tp2 pp2 experts cut": Case("tp2_sp_pp2", "tp1", model="qwen3_moe", settings=CUT, cut="reliability"),
    "tp2 vpp2 tied cut": Case("tp2_sp_vpp2", "pp2", model="qwen3_tied", settings=CUT, cut="reliability"),
}
# One step: the second one's candidates would be those of the changed student, not the reference's.
LIVE = replace(PAPER, steps=1)
CASES |= {
    "fused dp4": Case("tp1", "tp1", settings=LIVE, scoring="fused"),
    "fused tp2 sp full": Case(
        "tp2_sp", "tp2_sp", settings=replace(LIVE, kind="full_reverse_kl"), scoring="fused", tokens=64
    ),
    "fused pp2": Case("pp2", "pp2", model="qwen3_tied", settings=LIVE, scoring="fused", tokens=64),
    "fused tp2 pp2": Case("tp2_sp_pp2", "tp2_sp_pp2", settings=LIVE, scoring="fused"),
    "fused pp2 forward": Case("pp2", "pp2", settings=replace(LIVE, kind="forward_kl"), scoring="fused"),
    "fused pp2 jsd": Case("pp2", "pp2", settings=replace(LIVE, kind="generalized_jsd"), scoring="fused"),
    "fused dp4 sampled": Case(
        "tp1", "tp1", settings=replace(LIVE, kind="sampled_reverse_kl"), scoring="fused", recompute="full"
    ),
}
SPENT = Case("pp2", "tp1", settings=replace(CUT, threshold=1.0, w_drop=1.0), cut="reliability")  # nothing is kept


def answers(count: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(3 + 2 * i), draw((70, 9, 1, 55, 60, 33, 48, 21)[i])) for i in range(count)]


def rollouts(case: Case, reference: Result) -> list[Rollout]:
    kept = 0 if case.scoring == "fused" else case.settings.k  # fused: no tables of candidates at all
    return [
        Rollout(
            Prompt(i, "", prompt),
            i,
            torch.tensor(response),
            reference.sampled_logprobs[i],
            reference.candidates[i][:, :kept],
            reference.candidate_logprobs[i][:, :kept],
            "length",
            0,
        )
        for i, (prompt, response) in enumerate(answers(case.answers))
    ]


def config_of(case: Case, directories: dict[str, str]) -> Config:
    s = case.settings
    return parse_config(
        {
            "student": {
                "model": directories[case.model],
                "precision": "fp32",
                "parallel": LAYOUTS[case.student],
                "recompute": case.recompute,
            },
            "teacher": {"model": directories["teacher"], "precision": "fp32", "parallel": LAYOUTS[case.teacher]},
            "prune": {"k": s.k, "threshold": s.threshold, "w_drop": s.w_drop, "w_base": s.w_base, "cut": case.cut},
            "loss": {"kind": s.kind, "chunk_tokens": 16, "fused_head": case.fused_head},
            "score": {"mode": case.scoring},
            "train": {
                "lr": s.lr,
                "adam_beta1": s.beta1,
                "adam_beta2": s.beta2,
                "adam_eps": s.eps,
                "clip_grad": s.clip,
                "weight_decay": s.weight_decay,
                "tokens_per_microbatch": case.tokens,
                "distributed_optimizer": case.distributed_optimizer,
            },
            "data": {"prompts": "none.jsonl"},
        }
    )


def megatron_steps(case: Case, reference: Result, directories: dict[str, str]) -> dict:
    config = config_of(case, directories)
    with student_model(directories[case.model], case.student, recompute=case.recompute) as student:
        teacher = teacher_model(directories["teacher"], case.teacher)
        ddp = wrap_ddp(student, config.train)
        optimizer = build_optimizer(student, ddp, config.train)
        trainer = Trainer(student, {"teacher": teacher}, ddp, optimizer, build_scheduler(optimizer, config.train))
        step = TrainingStep(trainer, config)
        made, signal = rollouts(case, reference), make_signal(config.prune)
        if case.scoring == "fused":
            scores = []
        elif case.cut == "reliability":
            scores = score_until_spent(teacher, made, signal, config.prune, case.tokens, PhaseClock())
        else:
            scores = score_rollouts(teacher, made, signal, case.tokens)
        batch = assign_prune_weights(made, scores, config.prune, signal)
        results = [step(batch) for _ in range(case.settings.steps)]
        return {
            "losses": [r.loss for r in results],
            "grad_norms": [r.grad_norm for r in results],
            "applied": [r.applied for r in results],
            "microbatches": results[0].microbatches,
            "trained": sum(batch.kept_length),
            "effective": batch.effective_length,
            "reverse_kl": batch.reverse_kl,
            "overlap": [s.columns["overlap"] for s in batch.scores],
            "parameters": {n: p.clone() for n, p in export_parameters(student)},
        }


def all_cases(rank: int, world: int, references: dict[str, Result], directories: dict[str, str]):
    return {
        name: megatron_steps(case, references[name], directories) for name, case in {**CASES, "spent": SPENT}.items()
    }


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {family: str(make(family, root / family)) for family in ("qwen3", "qwen3_tied", "qwen2", "qwen3_moe")}
    made["teacher"] = str(make("qwen3", root / "teacher", hidden_size=48, num_hidden_layers=2, intermediate_size=80))
    return made


@pytest.fixture(scope="module")
def references(directories):
    done: dict[tuple, Result] = {}
    found = {}
    for name, case in {**CASES, "spent": SPENT}.items():
        key = (case.model, case.answers, str(case.settings))
        if key not in done:
            done[key] = run(directories[case.model], directories["teacher"], answers(case.answers), case.settings)
        found[name] = done[key]
    return found


@pytest.fixture(scope="module")
def results(references, directories):
    return run_distributed(4, all_cases, references, directories)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_reference(name, results, references):
    expected, case = references[name], CASES[name]
    for found in (r[name] for r in results):
        assert found["applied"] == [True] * case.settings.steps
        assert found["effective"] == expected.effective_length
        assert found["losses"] == pytest.approx(expected.losses, rel=1e-4)
        assert found["grad_norms"] == pytest.approx(expected.grad_norms, rel=1e-4)
        for mine, theirs in zip(found["overlap"], expected.overlap):
            assert len(mine) == len(theirs) or case.cut == "reliability"  # the teacher may stop where nothing is left
            torch.testing.assert_close(mine, theirs[: len(mine)])
        if case.cut == "reliability":
            assert found["trained"] == sum(expected.effective_length) < sum(len(w) for w in expected.prune_weight)
        parameters = {n: p for n, p in expected.parameters.items() if n in found["parameters"]}
        assert set(parameters) == set(found["parameters"])
        if case.scoring == "fused":
            for mine, p, q in zip(found["reverse_kl"], expected.candidate_logprobs, expected.teacher_logprobs):
                torch.testing.assert_close(mine, (p.softmax(-1) * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
        for parameter, value in found["parameters"].items():
            error = float((value - parameters[parameter]).norm() / parameters[parameter].norm())
            assert error < 2e-5, parameter  # the two steps change it by 1e-2


def test_the_step_changes_the_parameters_far_more_than_the_tolerance(results, directories):
    from safetensors.torch import load_file

    before = load_file(f"{directories['qwen3']}/model.safetensors")
    for name, value in results[0]["dp4"]["parameters"].items():
        assert float((value - before[name]).norm() / before[name].norm()) > 3e-3, name


def test_a_batch_without_anything_to_learn_from_is_harmless(results, references):
    for found in (r["spent"] for r in results):
        assert found["losses"] == [0.0, 0.0] and found["grad_norms"] == [0.0, 0.0]
        assert found["microbatches"] == 1 and found["trained"] == 0
        for name, value in found["parameters"].items():  # weight decay alone
            torch.testing.assert_close(value, references["spent"].parameters[name], rtol=1e-6, atol=1e-7)


def test_answers_fill_as_few_microbatches_as_the_limit_allows(results):
    assert results[0]["dp4"]["microbatches"] == 1
    assert results[0]["vpp2"]["microbatches"] % 2 == 0
    assert results[0]["tp2 pp2 cut"]["microbatches"] == 2  # one a stage
    assert results[0]["dp4 cut"]["trained"] < results[0]["dp4"]["trained"]
