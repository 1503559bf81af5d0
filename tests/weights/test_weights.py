"""Round trips of every family through every layout, bit by bit, and their logits against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_opd.compat.cpu_platform import apply_cpu_platform
from megatron_opd.config import ModelConfig, ParallelConfig
from megatron_opd.models.build import build_model
from megatron_opd.models.compare import difference, megatron_logits
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import together
from megatron_opd.parallel.groups import teacher_layout
from megatron_opd.weights.converted import save_converted
from megatron_opd.weights.export import export_parameters
from tests.distributed import run_distributed
from tests.layouts import student_model
from tests.models.tiny_families import FAMILIES, VOCAB, make

BUCKET = 1 << 13  # a few matrices; the embeddings are larger
TOKENS = torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(1))  # beyond what rope scaling starts from
ALL = [family for family in FAMILIES if family != "llama_9_heads"]
MOE = ["qwen3_moe", "qwen3_moe_softmax_first"]
# A process count, and layouts with the families that they take.
CASES = {
    1: [({}, list(FAMILIES))],
    2: [({"tensor": 2}, ALL), ({"pipeline": 2}, ALL), ({"expert": 2}, MOE)],
    4: [({"tensor": 2, "pipeline": 2}, ALL), ({"pipeline": 2, "expert": 2}, MOE), ({"tensor": 2, "expert": 2}, MOE)],
    6: [({"tensor": 3, "pipeline": 2}, ["llama_9_heads"])],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory per family, in fp32, with transformers' logits beside it."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make(family, root / family)
        model = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.save(model(TOKENS[None]).logits[0], root / f"{family}.logits")
    return root


def load(directory: Path, parallel: ParallelConfig) -> Model:
    config = ModelConfig(model=str(directory), parallel=parallel, precision="fp32")
    return build_model("teacher", config, teacher_layout(parallel), torch.device("cpu"))


def check_export(model: Model, directory: Path) -> None:
    """The stream holds exactly the tensors of the safetensors file, bit by bit, on this rank."""
    stream = export_parameters(model, BUCKET)
    got = {name: tensor.clone() for name, tensor in stream}
    wanted = load_file(directory / "model.safetensors")
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def check_logits(model: Model, directory: Path) -> None:
    wanted = torch.load(f"{directory}.logits")
    assert difference(megatron_logits(model, TOKENS), wanted).relative < 1e-5


def round_trips(rank: int, world_size: int, root: Path) -> None:
    apply_cpu_platform()
    for keys, families in CASES[world_size]:
        parallel = ParallelConfig(**keys)
        for family in families:
            model = load(root / family, parallel)
            with together():
                check_export(model, root / family)
            check_logits(model, root / family)
            out = root / f"{family}@{'_'.join(keys)}{world_size}"
            save_converted(model, root / family, out)


def load_everywhere(rank: int, world_size: int, root: Path) -> None:
    """What every layout saved loads in this one."""
    apply_cpu_platform()
    for keys, families in CASES[world_size][:2]:
        for family in families:
            for directory in sorted(root.glob(f"{family}@*")):
                with together():
                    check_export(load(directory, ParallelConfig(**keys)), root / family)


def in_global_groups(rank: int, world_size: int, root: Path) -> None:
    """Sequence parallelism and virtual pipeline stages; ranks that do not want the tensors take part and get none."""
    for family in MOE:
        with student_model(root / family, "tp2_sp") as model:
            check_logits(model, root / family)
    with student_model(root / "qwen3", "vpp2") as model:
        with together():
            check_export(model, root / "qwen3")
        check_logits(model, root / "qwen3")
        stream = export_parameters(model, BUCKET, keep=rank == 1)
        assert len(list(stream)) == (len(load_file(root / "qwen3" / "model.safetensors")) if rank else 0)


def one_rank(rank: int, world_size: int, root: Path) -> None:
    round_trips(rank, world_size, root)


def two_ranks(rank: int, world_size: int, root: Path) -> None:
    round_trips(rank, world_size, root)
    load_everywhere(rank, world_size, root)
    in_global_groups(rank, world_size, root)


@pytest.mark.parametrize("world_size", [1, 4, 6, 2])
def test_every_family_goes_through_every_layout_unchanged(root, world_size):
    work = two_ranks if world_size == 2 else one_rank
    run_distributed(world_size, work, root)
