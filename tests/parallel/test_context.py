"""Context parallelism: the split itself, and logits, scores and generated tokens on gloo against the unsplit models."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, _apply_rotary_pos_emb_thd
from transformers import AutoModelForCausalLM

from megatron_opd.config import PruneConfig
from megatron_opd.models import packed
from megatron_opd.models.model import Model
from megatron_opd.models.packed import pack_row
from megatron_opd.parallel.context import held_positions, padded_length, response_positions, row_order
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.prune.signals import make_signal
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.scoring.segments import SegmentScorer
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.types import Prompt
from tests import reference_step
from tests.distributed import run_distributed
from tests.layouts import student_model, teacher_model, whole_vocabulary
from tests.models.tiny_families import VOCAB, make
from tests.scoring.test_scoring import TOP_P, K, as_rollouts, in_segments
from tests.scoring.test_scoring import answers as scored_answers

LENGTHS = [5, 30, 1, 17]  # of the sequences of one row, none of which divides
# Student's layout and teacher's, in a world of four.
PAIRS = [
    ("cp2", "tp2"),
    ("cp4", "cp2_pp2"),
    ("cp2_tp2", "tp1"),
    ("cp2_tp2_sp", "cp4"),
    ("cp2_pp2", "cp2_tp2_sp"),
    ("cp2_vpp2", "pp2"),
    ("tp2", "cp2"),
]
TEACHERS = ("cp2", "cp4", "cp2_tp2_sp", "cp2_pp2")


def kernel_place(token: int, ends: list[int], rank: int, size: int) -> int:
    """The place of a rank's token in the row, written after the description of Transformer Engine's kernel: the first
    half of a rank's part of a sequence is its chunk `rank`, the second half the mirrored chunk."""
    local = [end // size for end in ends]
    sequence = max(i for i, start in enumerate(local[:-1]) if start <= token)
    held = local[sequence + 1] - local[sequence]
    index = token - local[sequence]
    chunk = rank if index < held // 2 else 2 * size - 2 - rank
    return index + local[sequence] * size + held // 2 * chunk


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_split_is_transformer_engines(size):
    lengths = [padded_length(n, size) for n in (1, 40, 7, 2 * size)]
    assert all(n % (2 * size) == 0 and n - m < 2 * size for n, m in zip(lengths, (1, 40, 7, 2 * size)))
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    parts = [held_positions(lengths, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        assert part.tolist() == [kernel_place(t, ends, rank, size) for t in range(sum(lengths) // size)]
    joined = torch.cat(parts)
    assert sorted(joined.tolist()) == list(range(sum(lengths)))
    assert joined[row_order(lengths, size)].tolist() == list(range(sum(lengths)))


def test_without_a_split_nothing_is_padded_or_moved():
    assert padded_length(7, 1) == 7 and padded_length(0, 4) == 0
    assert held_positions([3, 4], 0, 1).tolist() == list(range(7))
    assert response_positions(3, 5, 0, 1).tolist() == list(range(5))


def test_a_length_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="6 tokens does not split into 4 equal chunks"):
        held_positions([8, 6], 0, 2)


@pytest.mark.parametrize("prompt, response", [(1, 1), (3, 20), (9, 2), (30, 1)])
@pytest.mark.parametrize("size", [2, 4])
def test_every_response_token_is_predicted_on_one_rank(prompt, response, size):
    found = torch.cat([response_positions(prompt, response, rank, size) for rank in range(size)])
    assert sorted(found.tolist()) == list(range(response))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_row_for_transformer_engine(rank):
    lengths = [8, 4, 12]
    row = pack_row(lengths, torch.device("cpu"), True, (rank, 2))
    assert row.qkv_format == "thd" and row.max_seqlen_q == row.max_seqlen_kv == 12
    assert row.cu_seqlens_q.tolist() == row.cu_seqlens_kv.tolist() == [0, 8, 12, 24]  # of whole sequences
    assert row.cu_seqlens_q.dtype == row.cu_seqlens_kv.dtype == torch.int32
    assert row.cu_seqlens_q_padded is None and row.cu_seqlens_kv_padded is None  # no padding between sequences
    assert row.cp_group is None and row.local_cp_size is None  # the group that the attention was built with
    assert row.take(torch.arange(24)).tolist() == held_positions(lengths, rank, 2).tolist()


def rotation_error(model: Model) -> float:
    """Between what Megatron-Core does to a THD row's queries under context parallelism and what our core's row gets."""
    size = model.layout.context[1]
    lengths = [padded_length(n, size) for n in LENGTHS]
    thd, plain = (pack_row(lengths, torch.device("cpu"), thd, model.layout.context) for thd in (True, False))
    rotary = model.chunks[0].rotary_pos_emb
    values = torch.randn(sum(lengths) // size, 2, 16, generator=torch.Generator().manual_seed(0))
    theirs = _apply_rotary_pos_emb_thd(
        values, thd.cu_seqlens_q, rotary(thd, packed_seq=True), cp_group=model.layout.groups.cp
    )
    ours = _apply_rotary_pos_emb_bshd(values[:, None], rotary(plain))[:, 0]
    assert not torch.allclose(ours, values)
    return float((ours - theirs).abs().max())


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in LENGTHS]


def row_logits(model: Model) -> list[torch.Tensor] | None:
    """Logits of every sequence of two equal rows, put together from all context-parallel ranks, on the last stage."""
    row, total = model.row(LENGTHS)
    tokens, at = torch.zeros(total, dtype=torch.int64), 0
    for sequence, padded in zip(sequences(), row.lengths):
        tokens[at : at + len(sequence)] = sequence
        at += padded
    found = []

    def forward_step(iterator, chunk):
        next(iterator)
        out = chunk(row.take(tokens)[None], None, None, packed_seq_params=row)
        return out, lambda output, non_loss_data: found.append(whole_vocabulary(model, output[0]))

    with torch.no_grad():
        run_schedule(
            forward_step,
            model.chunks,
            model.config,
            model.layout,
            range(2),
            [total] * 2,
            forward_only=True,
            collect=True,
        )
    if not model.layout.is_last_stage:
        assert not found
        return None
    assert torch.equal(*found)
    group = model.layout.groups.cp
    parts = [torch.empty_like(found[0]) for _ in range(group.size())]
    dist.all_gather(parts, found[0], group=group)
    assert len(parts[0]) == total // group.size()
    whole = torch.empty(total, VOCAB)
    for rank, part in enumerate(parts):
        whole[held_positions(row.lengths, rank, group.size())] = part
    return [part[:n] for part, n in zip(whole.split(row.lengths), LENGTHS)]


def worst_error(model: Model, reference: list[torch.Tensor]) -> float | None:
    found = row_logits(model)
    return None if found is None else max(float((a - b).abs().max()) for a, b in zip(found, reference, strict=True))


def generated(student: Model) -> list[tuple[list[int], torch.Tensor, str]]:
    engine = MegatronEngine(student, {11, 40}, max_batch=2)
    requests = [Request(Prompt(i, "", [5 + i, 17, 3][: 1 + i % 3]), i) for i in range(7)]
    made = engine.generate(requests, Sampling(12, seed=9, top_logprobs=3))
    return [(r.tokens.tolist(), r.logprobs, r.end_reason) for r in made]


def everything(rank: int, world: int, directories, logits, known):
    found = {"errors": {}, "generated": {}, "scores": {}}
    rollouts = as_rollouts(known)
    with student_model(directories["student"], "tp1") as student:
        found["generated"]["tp1"] = generated(student)
        for layout in ("tp1", *TEACHERS):
            teacher = teacher_model(directories["teacher"], layout)
            for name in ("overlap", "teacher_top_p"):
                signal = make_signal(PruneConfig(signal=name, k=K, teacher_top_p=TOP_P))
                found["scores"][layout, name, "whole"] = score_rollouts(teacher, rollouts, signal, 60)
                scorer = SegmentScorer(teacher, signal, 60, slots=len(rollouts))
                found["scores"][layout, name, "segments"] = in_segments(scorer, rollouts, seed=4)
    for own, other in PAIRS:
        with student_model(directories["student"], own) as student:
            teacher = teacher_model(directories["teacher"], other)
            if student.layout.context[1] > 1:
                found["errors"][f"rotation {own}"] = rotation_error(student)
            found["errors"][f"student {own}"] = worst_error(student, logits["student"])
            found["errors"][f"teacher {other} beside {own}"] = worst_error(teacher, logits["teacher"])
            found["generated"][own] = generated(student)
    return found


def reference_logits(directory) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(s[None]).logits[0] for s in sequences()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    directories = {
        "student": str(make("qwen3", root / "student")),
        "teacher": str(make("qwen2", root / "teacher", hidden_size=48, num_hidden_layers=2)),
    }
    logits = {name: reference_logits(directory) for name, directory in directories.items()}
    settings = reference_step.Settings(k=K, steps=0)
    known = reference_step.run(directories["student"], directories["teacher"], scored_answers(), settings)
    return run_distributed(4, everything, directories, logits, known), known


def test_logits_of_every_token_equal_the_unsharded_model(results):
    seen = set()
    for found in results[0]:
        for case, error in found["errors"].items():
            if error is not None:
                seen.add(case)
                assert error < 1e-5, case
    assert seen == set(results[0][0]["errors"])  # each case had a last stage


@pytest.mark.parametrize("way", ["whole", "segments"])
@pytest.mark.parametrize("layout", TEACHERS)
def test_scores_equal_those_of_context_one(layout, way, results):
    for found in results[0]:
        for signal, column in (("overlap", "overlap"), ("teacher_top_p", "accepted")):
            expected = found["scores"]["tp1", signal, "whole"]
            for mine, theirs, known in zip(found["scores"][layout, signal, way], expected, results[1].teacher_logprobs):
                torch.testing.assert_close(mine.logprobs, known, atol=1e-5, rtol=0)  # transformers
                torch.testing.assert_close(mine.sampled_logprobs, theirs.sampled_logprobs, atol=1e-5, rtol=0)
                assert torch.equal(mine.columns[column], theirs.columns[column])


@pytest.mark.parametrize("layout", [own for own, _ in PAIRS])
def test_generated_tokens_equal_those_of_context_one(layout, results):
    for found in results[0]:
        for mine, theirs in zip(found["generated"][layout], found["generated"]["tp1"], strict=True):
            assert mine[0] == theirs[0] and mine[2] == theirs[2]
            torch.testing.assert_close(mine[1], theirs[1], atol=1e-5, rtol=0)


def test_no_mask_survives_the_forward_pass(monkeypatch):
    """Queries behind earlier keys are masked block by block, and the backward pass makes the masks again."""
    monkeypatch.setattr(packed, "_MASKED_QUERIES", 16)
    attention = packed.PackedAttention.__new__(packed.PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 8, generator=generator, requires_grad=True) for n in (60, 100, 100))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attention._attend(q, k, v, past=40)
    assert not any(t.shape[-2:] == (16, n) for t in kept for n in range(41, 101))
    out.square().sum().backward()
    mine = [x.grad.clone() for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    scores = torch.einsum("shd,thd->hst", q.double(), k.double()) / 8**0.5
    hidden = torch.arange(100)[None] > torch.arange(40, 100)[:, None]
    expected = torch.einsum("hst,thd->shd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v.double())
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    for gradient, x in zip(mine, (q, k, v)):
        torch.testing.assert_close(gradient, x.grad, atol=1e-4, rtol=1e-4)
