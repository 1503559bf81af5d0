"""Transformer Engine for real, on one GPU: FP8 itself first, then our models, steps, checkpoints and commands with it.

The same things run on CPUs against a stand-in (tests/models/test_transformer_engine.py); here it is shown that the
stand-in speaks the truth.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_opd.config import ParallelConfig, parse_config
from megatron_opd.models.build import build_model
from megatron_opd.models.compare import difference, megatron_logits
from megatron_opd.models.packed import pack_row
from megatron_opd.parallel.groups import student_layout
from megatron_opd.training.setup import Trainer, build_optimizer, build_scheduler, init_distributed, wrap_ddp
from megatron_opd.training.step import StepResult, TrainingStep
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores
from megatron_opd.weights.converted import save_converted
from megatron_opd.weights.export import export_parameters
from megatron_opd.weights.parameters import local_parameters, values
from tests.models.test_transformer_engine import (
    LAYER,
    TOKENS,
    equal,
    exported,
    first_layer,
    greedy,
    load,
    renewed_after_an_update,
)
from tests.models.tiny_families import VOCAB, make
from tests.tiny_run import REPOSITORY, Case, TinyRun, make_model, run_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch.cuda finds none here"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="needs transformer-engine (pip install 'megatron_opd[gpu]', or tests/gpu/run_on_lent_machine.sh)",
    ),
]

FP8 = {"precision": "bf16", "fp8": "hybrid"}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}


def can_run(recipe: str) -> None:
    """Skips what this GPU or its CUDA lacks."""
    from transformer_engine.pytorch import fp8

    check = fp8.check_fp8_block_scaling_support if recipe == "blockwise" else fp8.check_fp8_support
    able, reason = check()
    if not able:
        pytest.skip(f"{recipe}: {reason}")


# ---- FP8 itself


@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise"])
def test_fp8_products(recipe):
    """Output and both gradients of one layer: bf16 within a hundredth, FP8 within a tenth and visibly not bf16."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling

    if recipe:
        can_run(recipe)
    kinds = {"delayed": DelayedScaling, "tensorwise": Float8CurrentScaling, "blockwise": Float8BlockScaling}
    made = kinds[recipe]() if recipe else None
    torch.manual_seed(0)
    x, w, dy = (torch.randn(*s, device="cuda").bfloat16() for s in ((2048, 1024), (4096, 1024), (2048, 4096)))
    layer = te.Linear(1024, 4096, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.copy_(w)
    for _ in range(3):  # delayed scaling learns its scales from earlier passes
        layer.weight.grad, x = None, x.detach().requires_grad_()
        with te.fp8_autocast(enabled=made is not None, fp8_recipe=made):
            y = layer(x)
        y.backward(dy)
    exact = x.float() @ w.float().T, dy.float() @ w.float(), dy.float().T @ x.float()
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip((y, x.grad, layer.weight.grad), exact)]
    assert max(errors) < (0.1 if recipe else 0.01), errors
    assert not recipe or min(errors) > 0.01, f"that was not FP8: {errors}"


# ---- models


@pytest.fixture(scope="module")
def device():
    config = parse_config(
        {"device": "cuda", "student": {"model": "/s"}, "teacher": {"model": "/t"}, "data": {"prompts": "/p.jsonl"}}
    )
    return init_distributed(config)


@pytest.fixture(autouse=True)
def groups(request):
    """Megatron-Core's global groups, which runs end with."""
    if "device" in request.fixturenames:
        request.getfixturevalue("device")
        student_layout(ParallelConfig())


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("models") / "qwen3", dtype=torch.bfloat16, **SHAPE)


def test_parameters_and_what_the_stand_in_promises(device, directory):
    model = load(directory, device=device, **FP8)
    assert first_layer(model) == LAYER
    layer = model.chunks[0].decoder.layers[0].mlp.linear_fc2
    assert hasattr(layer, "fuse_wgrad_accumulation") and layer._fp8_workspaces == {}
    megatron_logits(model, TOKENS)
    assert layer._fp8_workspaces and layer.is_first_microbatch is False
    layer.is_first_microbatch = True
    row, tokens = model.row([37])
    assert tokens == 48
    with pytest.raises(Exception, match="divisible by 8|FP8"):  # why rows are padded
        model.chunks[0](TOKENS[None].to(device), None, None, packed_seq_params=pack_row([37], device, True))


@pytest.mark.parametrize("recipe", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_logits_beside_the_local_build(device, directory, recipe):
    wanted = megatron_logits(load(directory, device=device, precision="bf16", implementation="local"), TOKENS)
    if recipe == "bf16":
        found = difference(megatron_logits(load(directory, device=device, precision="bf16"), TOKENS), wanted)
        assert found.relative < 0.03
        return
    can_run(recipe)
    found = difference(megatron_logits(load(directory, device=device, fp8_recipe=recipe, **FP8), TOKENS), wanted)
    assert 0.001 < found.relative < 0.25 and found.top1_agreement > 0.6
    if recipe != "delayed":
        ends = load(directory, device=device, fp8_recipe=recipe, fp8_bf16_ends=1, **FP8)
        assert difference(megatron_logits(ends, TOKENS), wanted).relative < 0.25


def test_fp8_parameters_are_loaded_whole(device, directory, tmp_path):
    plain = load(directory, device=device, precision="bf16")
    exact = {p.name: t for p, t in local_parameters(plain)}
    save_converted(plain, directory, tmp_path / "converted")
    for source in (directory, tmp_path / "converted"):
        model = load(source, device=device, fp8_params=True, **FP8)
        found = local_parameters(model)
        in_fp8 = [(p, t) for p, t in found if values(t) is not t]
        assert len(in_fp8) == 4 * 4
        for p, tensor in in_fp8:
            wanted = exact[p.name]
            assert float((values(tensor) - wanted).abs().max()) < 0.07 * float(wanted.abs().max()), p.name
            assert torch.equal(tensor.get_high_precision_init_val().cpu(), wanted.cpu()), p.name
        assert all(t.dtype == torch.bfloat16 for t in exported(model).values())


def test_models_move_between_the_builds(device, directory, tmp_path):
    te = load(directory, device=device, precision="bf16")
    save_converted(te, directory, tmp_path / "te")
    local = load(tmp_path / "te", device=device, precision="bf16", implementation="local")
    assert equal(exported(local), exported(te))
    save_converted(local, directory, tmp_path / "local")
    assert equal(exported(load(tmp_path / "local", device=device, precision="bf16")), exported(te))


def trained_prompts() -> list[list[int]]:
    example = REPOSITORY / "examples" / "tiny"
    encode = sentencepiece.SentencePieceProcessor(model_file=str(example / "models" / "teacher" / "tokenizer.model"))
    lines = (example / "prompts" / "train.jsonl").read_text().splitlines()[:3]
    return [encode.encode(json.loads(line)["prompt"]) for line in lines]


def test_generation(device):
    """A trained model on what it was trained for: its choices do not hang on rounding."""
    prompts, example = trained_prompts(), REPOSITORY / "examples" / "tiny" / "models" / "teacher"
    wanted = greedy(load(example, device=device, precision="bf16", implementation="local"), prompts)
    assert greedy(load(example, device=device, precision="bf16"), prompts) == wanted
    in_fp8 = load(example, device=device, **FP8)
    found = greedy(in_fp8, prompts)  # three answers are no whole block
    same = sum(a == b for x, y in zip(found, wanted) for a, b in zip(x, y))
    assert same >= 18, (found, wanted)
    renewed_after_an_update(in_fp8, [*prompts[0], *wanted[0]])


# ---- a training step


def batch() -> ScoredBatch:
    """Four answers with a random teacher's view."""
    source = torch.Generator().manual_seed(3)
    rollouts, scores = [], []
    for i, n in enumerate((70, 9, 55, 33)):
        ids = torch.stack([torch.randperm(VOCAB, generator=source)[:4] for _ in range(n)])
        own = torch.randn(n, 4, generator=source).log_softmax(-1)
        prompt = Prompt(i, "", torch.randint(VOCAB, (5 + i,), generator=source).tolist())
        tokens = torch.randint(VOCAB, (n,), generator=source)
        rollouts.append(Rollout(prompt, i, tokens, own[:, 0], ids, own, "length", 0))
        theirs = torch.randn(n, 4, generator=source).log_softmax(-1)
        scores.append(TeacherScores(theirs, theirs[:, 0], {"overlap": torch.ones(n)}, n))
    lengths = [len(r) for r in rollouts]
    weights = [torch.ones(n) for n in lengths]
    return ScoredBatch(rollouts, scores, weights, lengths, lengths, [0] * 4, sum(lengths))


def one_step(device, directory: Path, fused_head: bool = False, **student) -> tuple[StepResult, dict]:
    """A step, and the parameters after it; the second result proves that the first left a working model behind."""
    distributed = bool(student.get("fp8_params"))
    config = parse_config(
        {
            "device": "cuda",
            "student": {"model": str(directory), "precision": "bf16", **student},
            "teacher": {"model": str(directory)},
            "prune": {"k": 4},
            "data": {"prompts": "none.jsonl"},
            "loss": {"fused_head": fused_head},
            "train": {"lr": 1e-3, "tokens_per_microbatch": 96, "distributed_optimizer": distributed},
        }
    )
    model = build_model("student", config.student, student_layout(config.student.parallel), device)
    ddp = wrap_ddp(model, config.train)
    optimizer = build_optimizer(model, ddp, config.train)
    scheduler = build_scheduler(optimizer, config.train)
    step = TrainingStep(Trainer(model, {"teacher": model}, ddp, optimizer, scheduler), config)
    first = step(batch())
    assert first.applied and first.microbatches > 1, first.reason
    second = step(batch())
    assert second.applied and second.loss != first.loss, second.reason
    stream = export_parameters(model)
    return first, {name: t.float().cpu() for name, t in stream}


def test_a_training_step_in_every_precision(device, directory):
    local, after = one_step(device, directory, implementation="local")
    te, te_after = one_step(device, directory)
    assert te.loss == pytest.approx(local.loss, rel=0.02)
    assert te.grad_norm == pytest.approx(local.grad_norm, rel=0.05)
    before = exported(load(directory, device=device, precision="bf16"))
    moved = {name: float((t - before[name].float().cpu()).norm()) for name, t in after.items()}
    for name, tensor in te_after.items():  # Adam's first steps are of the size of the learning rate, whatever the sign
        assert float((tensor - before[name].float().cpu()).norm()) == pytest.approx(moved[name], rel=0.2), name
    head, _ = one_step(device, directory, fused_head=True)
    assert head.loss == pytest.approx(te.loss, rel=0.01) and head.grad_norm == pytest.approx(te.grad_norm, rel=0.02)
    for recipe in ("tensorwise", "delayed", "blockwise"):
        settings = {"fp8": "hybrid", "fp8_recipe": recipe}
        if recipe == "blockwise":
            can_run(recipe)
        found, _ = one_step(device, directory, **settings)
        assert found.loss == pytest.approx(te.loss, rel=0.1), recipe
        assert found.grad_norm == pytest.approx(te.grad_norm, rel=0.3), recipe
    recomputed, _ = one_step(device, directory, fp8="hybrid", recompute="full")
    assert recomputed.loss == pytest.approx(te.loss, rel=0.1)
    parameters, _ = one_step(device, directory, fp8="hybrid", fp8_params=True)
    assert parameters.loss == pytest.approx(te.loss, rel=0.1)


# ---- runs and commands

BF16 = ("student.precision=bf16", "teacher.precision=bf16")
PLAIN = ("device=cuda", "student.parallel={}", "teacher.parallel={}", *BF16)
LOCAL = ("student.implementation=local",)
PARAMETERS = ("student.fp8=hybrid", "student.fp8_params=true", "train.distributed_optimizer=true")


def test_runs_move_between_the_builds_and_train_in_fp8(device, tmp_path):
    run = TinyRun(tmp_path)
    for number, who in enumerate(("student", "teacher")):
        make_model(run.folder / who, run.folder / "tokenizer.model", seed=number, **SHAPE)
    cases = [
        Case("te", (*PLAIN, "train.steps=4")),
        Case("local_after_te", (*PLAIN, *LOCAL, "train.steps=4"), resumes=("te", 2)),
        Case("te_after_local", (*PLAIN, "train.steps=6"), resumes=("local_after_te", 4)),
        Case("fp8_after_bf16", (*PLAIN, "student.fp8=hybrid", "train.steps=4"), resumes=("te", 2)),
        Case("fp8_parameters", (*PLAIN, *PARAMETERS)),
        Case("bf16_after_parameters", (*PLAIN, "train.steps=6"), resumes=("fp8_parameters", 4)),
        Case("both", (*PLAIN, "student.fp8=hybrid", "teacher.fp8=hybrid", "prune.preset=in_flight")),
        Case("offloaded", (*PLAIN, "teacher.fp8=hybrid", "teacher.offload=true")),
    ]
    outcomes = run_cases(0, 1, run.folder, cases)
    assert [o.error for o in outcomes] == [""] * len(cases)
    reference = run.metrics(run.folder / "te")
    for case in cases[1:4]:
        steps = run.metrics(run.folder / case.name)
        assert [s["step"] for s in steps] == list(range(1, len(steps) + 1)), case.name
        assert steps[2]["loss"] == pytest.approx(reference[2]["loss"], rel=0.3), case.name
        assert not any("skipped" in s for s in steps), case.name


@pytest.mark.parametrize("pair", ["close", "drifting"])
def test_doctor_measures_the_shift(pair, tmp_path):
    config = REPOSITORY / "examples" / "tiny" / f"{pair}.yaml"
    command = [sys.executable, "-m", "megatron_opd.cli", "doctor", str(config), "--fp8", "--nproc", "1"]
    command += [f"run_dir={tmp_path / 'run'}", *PLAIN]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Thresholds whose event rate moves" in done.stdout and done.stdout.count("FP8") >= 4
    print(done.stdout)
