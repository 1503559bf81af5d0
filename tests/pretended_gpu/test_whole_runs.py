"""Training runs in every layout and way of scoring, on two GPUs that are pretended: tensors of two devices raise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.models.tiny_families import make
from tests.pretended_gpu.runs import run_on_pretended_gpus
from tests.tiny_run import Case, TinyRun

GPU = ("device=cuda", "loss.kernels=torch")
FUSED = ("score.mode=fused", "teacher.parallel={tensor: 2, sequence: true}")
IN_FLIGHT = ("prune.preset=in_flight", "prune.segment=4", "prune.w_drop=0.2")
EXPERTS = ("student.model=FOLDER/experts", "teacher.model=FOLDER/experts")
RUNS = {
    "tp2_sp": (),
    "pp2": ("student.parallel={pipeline: 2}", "teacher.parallel={tensor: 2}"),
    "cp2": ("student.parallel={context: 2}", "teacher.parallel={context: 2}"),
    "ep2": (
        *EXPERTS,
        "student.parallel={expert: 2}",
        "teacher.parallel={expert: 2}",
        "rollout.engine=tests.pretended_gpu.drawn:DrawnEngine",
    ),
    "virtual_pipeline": (
        "student.model=FOLDER/experts",
        "student.parallel={pipeline: 2, virtual_pipeline: 2}",
        "train.tokens_per_microbatch=32",
    ),
    "bf16": ("student.precision=bf16", "teacher.precision=bf16", "train.distributed_optimizer=true"),
    "replicas": ("student.parallel={tensor: 1}", "teacher.parallel={tensor: 1}", "train.distributed_optimizer=true"),
    "in_flight": (*IN_FLIGHT, "rollout.max_batch=2"),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "fused": FUSED,
    "fused_jsd": (*FUSED, "loss.kind=generalized_jsd"),
    "fused_head": ("loss.fused_head=true", "loss.chunk_tokens=16"),
    "grpo": (*IN_FLIGHT, "prune.after_drift=grpo", "prune.grpo_share=1", "data.verifier=tests.pretended_gpu.even:even"),
    "offload": ("teacher.offload=true",),
    "teacher_top_p": ("prune.signal=teacher_top_p", "rollout.temperature=2"),
    "saved": ("checkpoint.every=1",),
    "clipped": ("rollout.importance_clip=1", "rollout.top_p=0.9", "rollout.top_k=6", "student.recompute=full"),
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each run's lines of metrics.jsonl. Fails with the traceback of the first run that fails."""
    folder = tmp_path_factory.mktemp("pretended")
    TinyRun(
        folder,
        train={"steps": 1, "warmup_steps": 0},
        checkpoint={"every": 0},
        prune={"budget": {"initial": 8, "minimum": 8, "maximum": 12}},
        student={"implementation": "local"},
        teacher={"implementation": "local"},
    )
    shutil.copy(folder / "tokenizer.model", make("qwen3_moe", folder / "experts", vocab_size=61))
    cases = [Case(name, (*GPU, *overrides)) for name, overrides in RUNS.items()]
    cases.append(Case("resumed", (*GPU, "checkpoint.every=1", "train.steps=2"), resumes=("saved", 1)))
    ended = run_distributed(2, run_on_pretended_gpus, folder, cases, fresh=True, start="spawn")
    refused = {case.name: outcome.error for rank in ended for case, outcome in zip(cases, rank) if outcome.error}
    assert not refused, "by the config"
    lines = {case.name: (folder / case.name / "metrics.jsonl").read_text().splitlines() for case in cases}
    return {name: [json.loads(line) for line in own] for name, own in lines.items()}


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_a_run_mixes_no_devices(name: str, metrics: dict[str, list[dict[str, Any]]]):
    assert [line["step"] for line in metrics[name]] == ([1, 2] if name == "resumed" else [1])
    assert all(math.isfinite(line["loss"]) and line["tokens_trained"] > 0 for line in metrics[name])


def mix(rank: int, world: int, folder: Path) -> dict[str, str]:
    """What each mistake of devices is answered with."""
    from tests.pretended_gpu.machine import pretended_gpus

    with pretended_gpus():
        import torch.distributed as dist

        gpu, cpu = torch.zeros(4, device="cuda"), torch.arange(4.0)
        gradient = torch.zeros(4, device="cuda", requires_grad=True)
        mistakes = {
            "sum": lambda: gpu + cpu,
            "product": lambda: torch.zeros(2, 4, device=torch.device("cuda", 0)) @ torch.ones(4, 2),
            "gpu index of a cpu tensor": lambda: cpu[torch.arange(2, device="cuda")],
            "concatenation": lambda: torch.cat([gpu, cpu]),
            "write": lambda: gpu.index_add_(0, torch.arange(4), gpu),
            "mask from the cpu": lambda: torch.where(cpu > 1, gpu, 0.0),
            "backward": lambda: (gradient * 2).sum().add(cpu.sum(0, keepdim=True)).backward(),
            "numpy": lambda: gpu.numpy(),
            "collective": lambda: dist.all_gather_into_tensor(torch.zeros(4 * world), gpu),
            "gaps": lambda: dist.all_reduce(torch.zeros(4, 4, device="cuda")[:, 0]),
        }
        found = {}
        for name, mistake in mistakes.items():
            try:
                mistake()
                found[name] = ""
            except (RuntimeError, TypeError, ValueError) as error:
                found[name] = str(error)
        return found


def waits(rank: int, world: int) -> dict[str, dict[str, int]]:
    """What is counted for each thing that waits, or does not."""
    from tests.pretended_gpu.device import SEEN
    from tests.pretended_gpu.machine import pretended_gpus

    with pretended_gpus():
        gpu = torch.arange(4.0, device="cuda")
        page, pinned = torch.arange(4.0), torch.empty(4, pin_memory=True)
        acts = {
            "item": lambda: gpu[0].item(),
            "bool": lambda: bool((gpu > 9).any()),
            "tolist": lambda: gpu.tolist(),
            "nonzero": lambda: gpu.nonzero(),
            "mask": lambda: gpu[gpu > 1],
            "masked number": lambda: gpu.clone().__setitem__(gpu > 1, 0.0),
            "new": lambda: torch.tensor([1, 2], device="cuda"),
            "pageable": lambda: page.to("cuda", non_blocking=True),
            "pinned": lambda: page.pin_memory().to("cuda", non_blocking=True),
            "back": lambda: gpu.cpu(),
            "back pinned": lambda: pinned.copy_(gpu, non_blocking=True),
            "arithmetic": lambda: (gpu * 2 + 1).sum(),
        }
        found = {}
        for name, act in acts.items():
            SEEN.clear()
            act()
            found[name] = {kind: count for kind, count in SEEN.totals().items() if count}
        return found


def test_mistakes_are_found(tmp_path: Path):
    """The control: without it, runs that find none would prove nothing."""
    for found in run_distributed(2, mix, tmp_path, fresh=True, start="spawn"):
        missed = [name for name, error in found.items() if not error]
        assert not missed
        assert "at least two devices, cuda:0 and cpu" in found["sum"] and "contiguous" in found["gaps"]


def test_waits_and_copies_are_counted():
    (found,) = run_distributed(1, waits, fresh=True, start="spawn")
    once = {"waits": 1}
    assert found == {
        "item": once,
        "bool": once,
        "tolist": once,
        "nonzero": once,
        "mask": once,
        "masked number": {},
        "new": {"pageable": 1},
        "pageable": {"pageable": 1},
        "pinned": {"pinned": 1},
        "back": {"copies_back": 1},
        "back pinned": {"pinned": 1},
        "arithmetic": {},
    }
