"""Megatron's logits and gradients against transformers, in every layout, from packed rows."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.compat.cpu_platform import PATCHED
from megatron_opd.parallel.schedule import run_schedule
from tests.distributed import run_distributed
from tests.layouts import student_model, teacher_model, whole_vocabulary
from tests.models.tiny_families import VOCAB, make

FAMILIES = ("qwen3", "qwen3_tied", "qwen2", "llama2")
ROWS = [[5, 9], [17], [3, 4, 6, 2], [1, 30]]  # lengths of the sequences of four rows
# Student's layout, teacher's layout; the first is enough for every family, the others run on two.
PAIRS = [
    ("tp2_sp_pp2", "tp2"),
    ("tp1", "pp2"),
    ("tp2_sp", "pp2"),
    ("pp2", "tp2_sp_pp2"),
    ("tp2_pp2", "tp1"),
    ("vpp2", "tp1"),
    ("tp2_sp_vpp2", "pp2"),
]


def sequences() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(VOCAB, (n,), generator=generator) for n in row] for row in ROWS]


def reference_logits(directory) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [torch.cat([model(s[None]).logits[0] for s in row]) for row in sequences()]


def run_rows(model, loss=None) -> list[torch.Tensor]:
    """Whole logits of each row on the last stage; with `loss` (of a row's whole logits and number), also backward."""
    rows = [model.row(lengths) for lengths in ROWS]
    found = []

    def forward_step(iterator, chunk):
        number = next(iterator)
        row, total = rows[number]
        tokens = torch.nn.functional.pad(torch.cat(sequences()[number]), (0, total - sum(ROWS[number])))
        out = chunk(tokens[None], None, None, packed_seq_params=row)

        def finish(output, non_loss_data=False):
            logits = output[0, : sum(ROWS[number])]
            found.append(whole_vocabulary(model, logits))
            if loss is None:
                return found[-1]
            value = loss(logits, number)
            return value, torch.zeros((), dtype=torch.int), value.detach()

        return out, finish

    with torch.set_grad_enabled(loss is not None):
        run_schedule(
            forward_step,
            model.chunks,
            model.config,
            model.layout,
            range(len(ROWS)),
            [n for _, n in rows],
            forward_only=loss is None,
            collect=loss is None,
        )
    return found


def worst_error(model, reference: list[torch.Tensor]) -> float | None:
    found = run_rows(model)
    if not model.layout.is_last_stage:
        assert not found
        return None
    return max(float((a - b).abs().max()) for a, b in zip(found, reference, strict=True))


def all_layouts(rank: int, world: int, directories: dict[str, str], references: dict[str, list[torch.Tensor]]):
    errors = {}
    for number, (own, other) in enumerate(PAIRS):
        for family in FAMILIES if number == 0 else ("qwen3_tied", "qwen2"):
            with student_model(directories[family], own) as student:
                teacher = teacher_model(directories["qwen3"], other)
                errors[f"student {family} {own}"] = worst_error(student, references[family])
                errors[f"teacher {other} beside {own}"] = worst_error(teacher, references["qwen3"])
    return errors


def gradients(rank: int, world: int, directory: str):
    """Gradients of a fixed function of the logits under each kind of recomputation."""
    found = {}
    for recompute in ("none", "full", "selective"):
        with student_model(directory, "tp2_sp_pp2", recompute=recompute) as student:
            for chunk in student.chunks:
                chunk.train()
            shard = student.padded_vocab_size // 2

            def loss(logits, number):
                weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(number))
                return (logits * weights).sum() / shard

            run_rows(student, loss)
            found[recompute] = {n: p.grad.clone() for n, p in student.chunks[0].named_parameters()}
    return {
        kind: max(float((found[kind][n] - g).abs().max()) for n, g in found["none"].items())
        for kind in ("full", "selective")
    } | {"size": max(float(g.abs().max()) for g in found["none"].values())}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: str(make(family, root / family)) for family in FAMILIES}


def everything(rank: int, world: int, directories, references):
    return all_layouts(rank, world, directories, references), gradients(rank, world, directories["qwen3"])


@pytest.fixture(scope="module")
def results(directories):
    references = {family: reference_logits(directory) for family, directory in directories.items()}
    return run_distributed(4, everything, directories, references)


def test_logits_equal_transformers_in_every_layout(results):
    seen = set()
    for errors, _ in results:
        for case, error in errors.items():
            if error is not None:
                seen.add(case)
                assert error < 1e-5, case
    assert seen == set(results[0][0])  # each case had a last stage


def test_recomputation_gives_the_same_gradients(results):
    for _, gradient in results:
        assert gradient["size"] > 1e-3
        assert gradient["full"] <= 1e-6 and gradient["selective"] <= 1e-6


@pytest.mark.parametrize("module, name", PATCHED)
def test_patched_name_exists_in_megatron_core(module, name):
    reduce(getattr, name.split("."), importlib.import_module(module))
