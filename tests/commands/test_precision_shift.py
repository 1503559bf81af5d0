"""`doctor --fp8`: the comparison against its definition, two precisions on a CPU, and the whole command."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from megatron_opd.commands.precision_shift import compare
from megatron_opd.config import load_config
from tests.distributed import LIMIT_S, run_distributed
from tests.stand_in import with_stand_in
from tests.tiny_run import TinyRun, child_environment

K, LENGTHS = 4, (30, 1, 17)


def readings(seed: int) -> dict[str, list[torch.Tensor]]:
    """Two random readings of three answers; the second is the first with some candidates replaced."""
    generator = torch.Generator().manual_seed(seed)
    first = [torch.stack([torch.randperm(9, generator=generator)[:K] for _ in range(n)]) for n in LENGTHS]
    second = [torch.where(torch.rand(ids.shape, generator=generator) < 0.2, ids + 100, ids) for ids in first]
    return {"a": first, "b": second}


def test_the_comparison_against_its_definition():
    student, teacher, w_drop = readings(0), readings(1), 0.15
    shift = compare(student, teacher, w_drop, thresholds=(0.5, 0.6), limit=0.2)
    assert shift.tokens == sum(LENGTHS)

    def overlaps(own: str, theirs: str) -> list[list[float]]:
        pairs = zip(student[own], teacher[theirs])
        return [[len(set(x.tolist()) & set(y.tolist())) / K for x, y in zip(s, t)] for s, t in pairs]

    base = overlaps("a", "a")
    for row, (own, theirs) in zip(shift.combinations, (("a", "a"), ("b", "a"), ("a", "b"), ("b", "b")), strict=True):
        assert (row.student, row.teacher) == (own, theirs)
        found = overlaps(own, theirs)
        flat = [(x, y) for answer, before in zip(found, base) for x, y in zip(answer, before)]
        assert row.overlap == pytest.approx(sum(x for x, _ in flat) / len(flat))
        assert row.changed == pytest.approx(sum(x != y for x, y in flat) / len(flat))
        for threshold in (0.5, 0.6):
            events = [[x < threshold for x in answer] for answer in found]
            assert row.event_rate[threshold] == pytest.approx(sum(map(sum, events)) / len(flat))
            flipped = sum((x < threshold) != (y < threshold) for x, y in flat) / len(flat)
            assert row.flipped[threshold] == pytest.approx(flipped)
            reliable = [sum(1 - w_drop * sum(e[: t + 1]) > 1e-8 for t in range(len(e))) for e in events]
            assert row.effective_length[threshold] == pytest.approx(sum(reliable) / len(reliable))
    rates = [[row.event_rate[t] for row in shift.combinations] for t in (0.5, 0.6)]
    wanted = [t for t, rate in zip((0.5, 0.6), rates) if max(abs(r - rate[0]) for r in rate) <= 0.2]
    assert shift.supported() == wanted
    kept = [len(set(x.tolist()) & set(y.tolist())) / K for s, t in zip(*student.values()) for x, y in zip(s, t)]
    assert shift.self_overlap["student"] == pytest.approx(sum(kept) / len(kept))


def test_equal_readings_shift_nothing():
    first = readings(0)["a"]
    shift = compare({"a": first, "b": first}, {"a": first, "b": first}, 0.01)
    assert shift.supported() == [0.5, 0.6, 0.7, 0.8, 0.9] and shift.self_overlap == {"student": 1.0, "teacher": 1.0}
    assert all(
        row.overlap == 1 and row.changed == 0 and set(row.flipped.values()) == {0.0} for row in shift.combinations
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("shift"), train={"prompts_per_step": 12})


def fp32_beside_bf16(rank: int, world: int, config_file: Path):
    from megatron_opd.commands.doctor import sample_responses
    from megatron_opd.commands.precision_shift import measure
    from megatron_opd.models.build import build_model
    from megatron_opd.parallel.groups import student_layout, teacher_layout
    from megatron_opd.prune.signals import make_signal
    from megatron_opd.rollout.megatron.engine import MegatronEngine
    from megatron_opd.scoring.separate import score_rollouts
    from megatron_opd.training.run import load_tokenizers
    from megatron_opd.training.setup import init_distributed

    config = load_config(config_file)
    device, (tokenizer, _) = init_distributed(config), load_tokenizers(config)
    both = ({"precision": "fp32"}, {"precision": "bf16"})
    shift = measure(config, tokenizer, device, ("fp32", "bf16"), {"student": both, "teacher": both})
    # the same answers, judged as training does
    student = build_model("student", config.student, student_layout(config.student.parallel), device)
    teacher = build_model("teacher", config.teacher, teacher_layout(config.teacher.parallel), device)
    rollouts = sample_responses(config, MegatronEngine(student, set(tokenizer.eos_ids), 8), tokenizer, 32, 1024)
    scores = score_rollouts(teacher, rollouts, make_signal(config.prune), 64)
    return shift.to_dict(), float(torch.cat([s.columns["overlap"] for s in scores]).mean())


def test_two_precisions_of_real_models(run):
    results = run_distributed(2, fp32_beside_bf16, run.config)
    assert results[0] == results[1]
    shift, overlap = results[0]
    assert shift["combinations"][0]["overlap"] == pytest.approx(overlap, abs=1e-6)
    assert 100 < shift["tokens"] <= 12 * 24 and 0.9 < shift["self_overlap"]["student"] < 1
    assert shift["combinations"][3]["changed"] > 0


def the_command(rank: int, world: int, config_file: Path) -> str:
    from megatron_opd.commands.precision_shift import diagnose_fp8

    extra = ("student.implementation=transformer_engine", "teacher.implementation=transformer_engine")
    said = io.StringIO()
    with redirect_stdout(said):
        assert diagnose_fp8(load_config(config_file, [*extra, "student.precision=bf16"])) == 0
    return said.getvalue()


def test_the_command_prints_the_table(run):
    first, second = with_stand_in(2, the_command, run.config)
    assert not second  # one rank speaks
    assert "events < 0.7" in first and "Thresholds whose event rate moves" in first
    rows = [line.split("│")[1:3] for line in first.splitlines() if line.startswith("│")]
    names = [(a.strip(), b.strip()) for a, b in rows]
    assert names == [("bf16", "bf16"), ("FP8", "bf16"), ("bf16", "FP8"), ("FP8", "FP8")]


def test_without_fp8_it_says_why(run):
    command = [
        sys.executable,
        "-m",
        "megatron_opd.cli",
        "doctor",
        str(run.config),
        "--fp8",
        "--nproc",
        "1",
        "student.parallel={}",
        "teacher.parallel={}",
    ]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "student.fp8: hybrid needs a GPU with FP8 and Transformer Engine; set fp8: null" in done.stderr
