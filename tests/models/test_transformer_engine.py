"""Megatron-Core's Transformer Engine layers, on the stand-in of tests/te_stand_in: names, values, FP8's demands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_opd.config import ConfigError, ModelConfig, ParallelConfig, TeacherConfig
from megatron_opd.models.build import build_model, check_layout
from megatron_opd.models.compare import difference, megatron_logits
from megatron_opd.models.fp8 import check_fp8, fuse_gradient_accumulation
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import together
from megatron_opd.parallel.groups import teacher_layout
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.rollout.reference import own_logprobs
from megatron_opd.types import Prompt
from megatron_opd.weights.converted import save_converted
from megatron_opd.weights.export import export_parameters
from megatron_opd.weights.parameters import local_parameters, values
from tests.layouts import destroy_groups, student_model
from tests.models.tiny_families import VOCAB, make
from tests.stand_in import with_stand_in

FAMILIES = ("qwen3", "qwen3_tied", "qwen2", "llama2", "qwen3_moe")
CONVERTED = ("qwen3_tied", "qwen3_moe")
TOKENS = torch.randint(VOCAB, (37,), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
LAYER = [  # parameters of one layer of Qwen3 in the Transformer Engine build, in their order
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
]
HYBRID = {"precision": "bf16", "fp8": "hybrid"}


def load(directory: Path, parallel: dict | None = None, device: torch.device = CPU, **values) -> Model:
    """In groups of its own; Transformer Engine's layers unless `implementation` says otherwise."""
    values = {"precision": "fp32", "implementation": "transformer_engine"} | values
    config = ModelConfig(model=str(directory), parallel=ParallelConfig(**parallel or {}), **values)
    return build_model("teacher", config, teacher_layout(config.parallel), device)


def first_layer(model: Model) -> list[str]:
    prefix = "decoder.layers.0."
    names = [name for name, _ in model.chunks[0].named_parameters()]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def exported(model: Model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in export_parameters(model)}


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- in processes that have the stand-in


def families(rank: int, world: int, root: Path) -> None:
    """Logits, and both directions of the exchange with the local build, through the converted format."""
    for family in FAMILIES:
        wanted, logits = load_file(root / family / "model.safetensors"), torch.load(root / f"{family}.logits")
        for parallel in ({"tensor": 2}, {"pipeline": 2}) if family in ("qwen3_tied", "qwen2") else ({"tensor": 2},):
            te = load(root / family, parallel)
            names = first_layer(te)
            assert "self_attention.linear_qkv.layer_norm_weight" in names and "input_layernorm.weight" not in names
            assert family != "qwen3" or names == LAYER
            with together():
                assert equal(exported(te), wanted), family
            assert difference(megatron_logits(te, TOKENS), logits).relative < 1e-5, family
            if "pipeline" in parallel or family not in CONVERTED:
                continue
            save_converted(te, root / family, root / f"{family}@te")
            local = load(root / f"{family}@te", {"pipeline": 2}, implementation="local")
            with together():
                assert equal(exported(local), wanted), family
            save_converted(local, root / family, root / f"{family}@local")
            with together():
                assert equal(exported(load(root / f"{family}@local", parallel)), wanted), family
        destroy_groups()
    with student_model(root / "qwen3", "tp2_sp", implementation="transformer_engine") as student:
        logits = torch.load(root / "qwen3.logits")
        assert difference(megatron_logits(student, TOKENS), logits).relative < 1e-5


def greedy(model: Model, prompts: Sequence[list[int]] = ([5, 9, 11, 3], [6, 9, 11], [7, 9])) -> list[list[int]]:
    """Answers to three prompts, a number that is no whole block of FP8."""
    engine = MegatronEngine(model, set(), 2)
    asked = [Request(Prompt(i, "", prompt), i) for i, prompt in enumerate(prompts)]
    answers = engine.generate(asked, Sampling(12, temperature=0.0))
    return [a.tokens.tolist() for a in answers]


def generation(rank: int, world: int, root: Path) -> None:
    directory = root / "wide"
    for parallel in ({"tensor": 2}, {"pipeline": 2}):
        assert greedy(load(directory, parallel)) == greedy(load(directory, parallel, implementation="local"))
        model = load(directory, parallel, **HYBRID)
        assert [len(a) for a in greedy(model)] == [12, 12, 12]
        # What a cached pass gives is what a whole one gives, within the rounding that other shapes bring.
        whole = megatron_logits(model, TOKENS[:-1]).log_softmax(-1).gather(1, TOKENS[1:, None])[:, 0]
        assert float((own_logprobs(model, TOKENS.tolist()) - whole).abs().max()) < 0.15
        renewed_after_an_update(model, TOKENS.tolist())
    destroy_groups()


def renewed_after_an_update(model: Model, tokens: list[int]) -> None:
    """An optimizer step changes parameters behind the layers' backs: generation must not run on the old ones."""
    before = own_logprobs(model, tokens)
    with torch.no_grad():
        for chunk in model.chunks:
            for layer in chunk.decoder.layers:
                layer.mlp.linear_fc2.weight.mul_(-1)
    after = own_logprobs(model, tokens)
    assert float((after - before).abs().max()) > 0.1
    for chunk in model.chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()
    assert torch.equal(own_logprobs(model, tokens), after)


def recipes(rank: int, world: int, root: Path) -> None:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as State

    directory = root / "wide"
    wanted = torch.load(root / "wide.logits")
    plain = megatron_logits(load(directory, precision="bf16"), TOKENS)
    exact = difference(plain, wanted).relative
    names = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    for recipe, name in names.items():
        for ends in (0, 1):
            model = load(directory, {"tensor": 2}, fp8_recipe=recipe, fp8_bf16_ends=ends, **HYBRID)
            State.entered.clear()
            found = difference(megatron_logits(model, TOKENS), wanted).relative
            assert State.entered == [name] * (4 - 2 * ends), recipe  # one layer at each end stays in bf16
            assert exact < found < 0.25, (recipe, ends, found)
    State.scales.clear()
    with student_model(directory, "pp2", **HYBRID, fp8_recipe="delayed", implementation="transformer_engine") as model:
        scales = [s.scale for s in State.scales]
        assert len(scales) == 4 * 2 * 2 and 1.0 not in scales  # learned, of inputs and weights, before the first pass
        assert difference(megatron_logits(model, TOKENS), wanted).relative < 0.25
    destroy_groups()


def fp8_parameters(rank: int, world: int, root: Path) -> None:
    """Loaded whole: an FP8 parameter's values share a scale; the optimizer's copy starts from the exact ones."""
    directory = root / "wide"
    plain = load(directory, {"tensor": 2}, precision="bf16")
    exact = {p.name: t for p, t in local_parameters(plain)}
    save_converted(plain, directory, root / "wide@bf16")
    for source in (directory, root / "wide@bf16"):
        model = load(source, {"tensor": 2}, fp8_params=True, **HYBRID)
        in_fp8 = 0
        for p, tensor in local_parameters(model):
            if values(tensor) is tensor:
                assert torch.equal(tensor, exact[p.name]), p.name
                continue
            in_fp8 += 1
            peak = float(exact[p.name].abs().max())
            assert float((values(tensor) - exact[p.name]).abs().max()) < 0.04 * peak, p.name
            assert torch.equal(tensor.get_high_precision_init_val(), exact[p.name]), p.name
        assert in_fp8 == 4 * 4  # qkv, projection, fc1 and fc2 of each layer
        assert all(t.dtype == torch.bfloat16 for t in exported(model).values())
    destroy_groups()


def everything(rank: int, world: int, root: Path) -> None:
    for part in (families, generation, recipes, fp8_parameters):
        part(rank, world, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory per family, in fp32, with transformers' logits beside it; `wide` fits FP8 at TP2."""
    root = tmp_path_factory.mktemp("families")
    for name in (*FAMILIES, "wide"):
        make("qwen3", root / name, intermediate_size=64) if name == "wide" else make(name, root / name)
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.save(model(TOKENS[None]).logits[0], root / f"{name}.logits")
    return root


def test_the_transformer_engine_build(root):
    with_stand_in(2, everything, root)


# ---- what cannot run is refused


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "message"),
    [
        ("tensorwise", (8, 0), "13.0", r"student.fp8: hybrid needs .* 8.9 .* this GPU has 8.0; set student.fp8: null"),
        ("delayed", (8, 9), "12.0", r"student.fp8: hybrid on Ada needs CUDA 12.1, torch has 12.0"),
        (
            "blockwise",
            (8, 9),
            "13.0",
            r"student.fp8_recipe: blockwise needs .* 9.0 .* set .*tensorwise",
        ),
        ("blockwise", (9, 0), "12.8", r"blockwise needs .* CUDA 12.9, .* torch CUDA 12.8; set .*tensorwise"),
        ("mxfp8", (9, 0), "13.0", r"mxfp8 needs .* 10.x \(Blackwell\), this GPU has 9.0; .* tensorwise or blockwise"),
        ("mxfp8", (12, 0), "13.0", r"mxfp8 needs .* this GPU has 12.0"),
    ],
)
def test_fp8_where_the_gpu_lacks_it(recipe, capability, cuda, message):
    with pytest.raises(ConfigError, match=message):
        check_fp8("student", ModelConfig(model="/m", fp8="hybrid", fp8_recipe=recipe), capability, cuda)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda"),
    [
        ("tensorwise", (8, 9), "12.4"),
        ("delayed", (9, 0), "12.0"),
        ("blockwise", (9, 0), "12.10"),
        ("blockwise", (9, 0), "13.0"),
        ("mxfp8", (10, 0), "13.0"),
    ],
)
def test_fp8_where_the_gpu_has_it(recipe, capability, cuda):
    check_fp8("student", ModelConfig(model="/m", fp8="hybrid", fp8_recipe=recipe), capability, cuda)
    check_fp8("student", ModelConfig(model="/m"), (7, 0), None)


def test_shapes_that_fp8_cannot_take(root):
    narrow = ModelConfig(model=str(root / "qwen3"), fp8="hybrid", parallel=ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match="student.fp8: hybrid .* multiples of 16, the FFN width is 24 on each of 2"):
        check_layout("student", narrow)
    ends = ModelConfig(model=str(root / "wide"), fp8="hybrid", fp8_bf16_ends=3, parallel=ParallelConfig(pipeline=2))
    with pytest.raises(ConfigError, match="fp8_bf16_ends: 3 is more than the 2 layers of a pipeline stage"):
        check_layout("student", ends)
    split = ParallelConfig(tensor=2, sequence=True)
    blocks = ModelConfig(model=str(root / "wide"), fp8="e4m3", fp8_recipe="blockwise", parallel=split)
    with pytest.raises(ConfigError, match="blockwise with sequence parallelism .* hidden size is 32; set .*tensorwise"):
        check_layout("student", blocks)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"fp8_bf16_ends": 1}, "fp8_bf16_ends: 1 needs fp8"),
        (ModelConfig, {"fp8": "hybrid", "fp8_bf16_ends": 1, "fp8_recipe": "delayed"}, "set fp8_recipe: tensorwise"),
        (TeacherConfig, {"fp8": "hybrid", "fp8_recipe": "delayed"}, "the teacher has none; set fp8_recipe"),
        (TeacherConfig, {"fp8": "hybrid", "fp8_params": True, "offload": True}, "set offload: false"),
    ],
)
def test_settings_that_contradict_each_other(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(model="/m", **values)


def test_gradients_are_accumulated_in_the_product_where_a_kernel_is(monkeypatch, tmp_path):
    class TransformerEngineLayer(torch.nn.Module):
        fuse_wgrad_accumulation = False

    class MegatronLayer(torch.nn.Module):
        gradient_accumulation_fusion = False

    layers = torch.nn.Sequential(TransformerEngineLayer(), MegatronLayer())
    fuse_gradient_accumulation([layers])
    assert layers[0].fuse_wgrad_accumulation and not layers[1].gradient_accumulation_fusion  # there is no apex
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    fuse_gradient_accumulation([layers])
    assert layers[1].gradient_accumulation_fusion
