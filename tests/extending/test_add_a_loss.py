"""The loss of docs/extending, in real runs: separate scoring with whole logits and with a fused head, in flight, and
fused scoring. With a limit that nothing reaches it is the method's loss, so each run has a run of the package's own to
be compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opd.losses import DistillTargets, Loss, LossOptions, VocabShard
from tests.distributed import run_distributed
from tests.extending.own_loss import ClippedReverseKL
from tests.tiny_run import Case, Outcome, TinyRun, run_cases

HERE = Path(__file__).parent
OWN = "loss.kind=tests.extending.own_loss:ClippedReverseKL"
WIDE, NARROW = "loss.options={limit: 1000}", "loss.options={limit: 0.1}"
FUSED = ("score.mode=fused", "teacher.parallel={tensor: 2, sequence: true}")
WHOLE = ("score.mode=fused", "student.parallel={}", "teacher.parallel={}")
MODES = {
    "separate": (),
    "fused_head": ("loss.fused_head=true", "loss.chunk_tokens=16"),
    "in_flight": ("prune.preset=in_flight", "prune.w_drop=0.2", "prune.segment=4"),
    "fused": FUSED,
}
SHORT = {"train": {"steps": 2, "warmup_steps": 0}, "checkpoint": {"every": 0}}


class HalfForwardKL(Loss):
    """Half the forward KL over the whole vocabulary, as whole logits of one tensor rank allow it in plain torch."""

    reads = "logits"

    def __call__(
        self,
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        shard: VocabShard,
        options: LossOptions | None = None,
    ) -> Tensor:
        assert shard.world == 1
        student = student_logits[:, : shard.vocab_size].log_softmax(-1)
        teacher = targets.require(self, "teacher_logits")[:, : shard.vocab_size].log_softmax(-1)
        return 0.5 * (weight * (teacher.exp() * (teacher - student)).sum(-1)).sum()


CASES = [
    *(Case(f"{mode}_package", changes) for mode, changes in MODES.items()),
    *(Case(f"{mode}_wide", (*changes, OWN, WIDE)) for mode, changes in MODES.items()),
    *(Case(f"{mode}_narrow", (*changes, OWN, NARROW)) for mode, changes in MODES.items()),
    Case("whole_package", (*WHOLE, "loss.kind=forward_kl")),
    Case("whole_own", (*WHOLE, f"loss.kind={__name__}:HalfForwardKL")),
    Case("no such parameter", (OWN, "loss.options={bound: 1}")),
    Case("a parameter that it refuses", (OWN, "loss.options={limit: 0}")),
    Case("whole logits without fused scoring", (f"loss.kind={__name__}:HalfForwardKL",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict[str, Outcome]]:
    run = TinyRun(tmp_path_factory.mktemp("runs"), **SHORT)
    outcomes = run_distributed(2, run_cases, run.folder, CASES)[0]
    return run, {case.name: outcome for case, outcome in zip(CASES, outcomes)}


def metrics(runs: tuple[TinyRun, dict[str, Outcome]], name: str) -> list[dict]:
    run, outcomes = runs
    assert not outcomes[name].error, outcomes[name].error
    return run.metrics(run.folder / name)


@pytest.mark.parametrize("mode", MODES)
def test_with_a_limit_that_nothing_reaches_it_is_the_methods_loss(mode, runs):
    own = metrics(runs, f"{mode}_wide")
    assert len(own) == 2
    assert own == metrics(runs, f"{mode}_package")


@pytest.mark.parametrize("mode", MODES)
def test_its_parameter_reaches_it(mode, runs):
    narrow, package = metrics(runs, f"{mode}_narrow")[0], metrics(runs, f"{mode}_package")[0]
    assert narrow["tokens_generated"] == package["tokens_generated"]  # the same responses
    assert abs(narrow["loss"]) <= 0.1 * 1.5 < package["loss"]  # shares sum to 1, prune weights are at most 1.5
    assert narrow["grad_norm"] < package["grad_norm"]


def test_a_loss_of_whole_logits_works_with_fused_scoring(runs):
    own, package = metrics(runs, "whole_own")[0], metrics(runs, "whole_package")[0]
    assert own["loss"] == pytest.approx(package["loss"] / 2, rel=1e-5)
    assert own["grad_norm"] == pytest.approx(package["grad_norm"] / 2, rel=1e-5)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no such parameter", ("loss.options", "bound", "ClippedReverseKL takes limit")),
        ("a parameter that it refuses", ("limit 0 must be positive",)),
        ("whole logits without fused scoring", ("HalfForwardKL", "set score.mode: fused")),
    ],
)
def test_what_does_not_fit_ends_the_run_before_models_are_loaded(name, words, runs):
    outcome = runs[1][name]
    assert outcome.exit_code == 2 and all(word in outcome.error for word in words), outcome.error


def test_it_works_by_the_command_line_from_a_folder_of_ones_own(tmp_path):
    shutil.copy(HERE / "own_loss.py", tmp_path)
    run = TinyRun(tmp_path, loss={"kind": "own_loss:ClippedReverseKL", "options": {"limit": 0.5}}, **SHORT)
    assert run.train(PYTHONPATH=f"{tmp_path}:{HERE.parents[1]}") == 0, run.output()
    assert len(run.metrics()) == 2


def test_the_terms_and_their_gradient_are_the_definitions():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 4, generator=generator, dtype=torch.float64).log_softmax(-1).requires_grad_()
    teacher = torch.randn(6, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    terms = ClippedReverseKL(limit=0.5).terms(student, teacher)
    rows = zip(student.tolist(), teacher.tolist())
    probabilities = [[float(torch.tensor(x).exp()) for x in row] for row in student.tolist()]
    expected = torch.tensor(
        [
            [p / sum(shares) * max(-0.5, min(0.5, a - b)) for p, a, b in zip(shares, own, theirs)]
            for shares, (own, theirs) in zip(probabilities, rows)
        ]
    ).double()
    torch.testing.assert_close(terms.detach(), expected, rtol=1e-6, atol=1e-7)
    terms.sum().backward()
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)
