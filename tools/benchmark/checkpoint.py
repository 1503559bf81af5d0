"""`checkpoint`: what saving costs a training step, asynchronous and not; size on disk; time to load it again."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.common import (
    REPOSITORY,
    BenchmarkError,
    ProcessGroup,
    alternate,
    clocked,
    print_table,
    resolve_device,
    shown,
    summary,
    write_json,
)
from benchmark.common import make_model as make_small_model
from benchmark.step import LAYOUTS, random_batch

MODES = ("none", "asynchronous", "synchronous")
EXAMPLE = REPOSITORY / "examples" / "tiny" / "models" / "student_close"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(EXAMPLE), help="Hugging Face directory of the student")
    parser.add_argument(
        "--qwen-layers",
        type=int,
        default=0,
        metavar="N",
        help="instead: a random model in Qwen3-1.7B's shape with N of its 28 layers",
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--responses", "--answers", type=int, default=16, help="of one step")
    parser.add_argument("--tokens", type=int, default=256, help="of the longest response")
    parser.add_argument("--microbatch", type=int, default=4096, help="tokens of one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where models and checkpoints are written; default: a temporary one")


class Saves:
    """One rank that trains on random responses and saves in either way. The parts of a run that only generation and
    scoring need are left out, so that a step is shorter, and saving a larger part of it, than in a run."""

    def __init__(self, rank: int, size: int, model: str, teacher: str, folder: str, settings: dict) -> None:
        import torch.distributed as dist

        from megatron_opd.checkpoint.checkpointer import Checkpointer
        from megatron_opd.config import parse_config
        from megatron_opd.training.setup import build_trainer, init_distributed
        from megatron_opd.training.step import TrainingStep

        self.device, self.number = settings["device"], 0
        _, parallel = LAYOUTS[settings["layout"]]
        values = {
            "device": self.device,
            "student": {"model": model, "precision": settings["precision"], "parallel": parallel},
            "teacher": {"model": teacher, "precision": settings["precision"]},
            "prune": {"k": 8},
            "train": {
                "steps": 10**6,
                "lr": 1e-6,
                "tokens_per_microbatch": settings["microbatch"],
                "distributed_optimizer": settings["distributed_optimizer"],
            },
            "data": {"prompts": "none.jsonl"},
        }
        config = parse_config(values)
        self.trainer = build_trainer(config, init_distributed(config))
        self.training_step = TrainingStep(self.trainer, config)
        self.batch = random_batch(settings["responses"], settings["tokens"], 1.0, self.trainer.student.vocab_size, 8)
        self.savers: dict[str, Any] = {}
        for mode in MODES[1:]:
            saving = {"asynchronous": mode == "asynchronous", "keep_last": 1, "every": 1}
            own = parse_config(values | {"run_dir": f"{folder}/{mode}", "checkpoint": saving})
            self.savers[mode] = Checkpointer(own, self.trainer, lambda text: None)
        dist.barrier()

    def step(self, mode: str) -> dict[str, Any]:
        """A step, a save where the mode has one, and further steps until that is complete.

        `stall`: seconds that training stood still for the save. `during`: the steps beside a save in the background.
        """
        seconds = self._train()
        if mode == "none":
            return {"step": seconds}
        saver, during = self.savers[mode], []
        self.number += 1
        began = time.perf_counter()
        stall, _ = clocked(lambda: saver.after_step(self.number, dict, wanted=True), self.device)
        first = stall
        while saver.last_step != self.number:
            if saver.warning:
                raise RuntimeError(saver.warning)
            during.append(self._train())
            more, _ = clocked(lambda: saver.after_step(self.number, dict, wanted=False), self.device)
            stall += more
        return {"step": seconds, "stall": stall, "copy": first, "during": during, "done": time.perf_counter() - began}

    def load(self, mode: str) -> float:
        """Seconds that loading the newest checkpoint takes."""
        seconds, state = clocked(self.savers[mode].load_latest, self.device)
        assert state == {}
        return seconds

    def memory(self) -> int:
        """Most bytes of this process's memory so far."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _train(self) -> float:
        seconds, result = clocked(lambda: self.training_step(self.batch), self.device)
        if not result.applied:
            raise RuntimeError(f"the step was skipped: {result.reason}")
        return seconds


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    keys = (
        "layout",
        "distributed_optimizer",
        "precision",
        "responses",
        "tokens",
        "microbatch",
        "repeats",
        "qwen_layers",
    )
    settings = {key: getattr(options, key) for key in keys} | {"device": device}
    folder = Path(tempfile.mkdtemp(prefix="benchmark-checkpoint-", dir=options.folder))
    try:
        results = measure(options, settings, folder)
    finally:
        shutil.rmtree(folder)
    report(results, settings)
    write_json(Path(options.json), "checkpoint", settings, results, device)
    return 0


def measure(options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    model, vocab = Path(options.model), 96
    if options.qwen_layers:
        from benchmark.convert import SHAPE, make_model

        model, vocab = folder / "model", SHAPE["vocab_size"]
        make_model(model, options.qwen_layers)
    if not (model / "config.json").is_file():
        raise BenchmarkError(f"{model} is no Hugging Face directory")
    teacher = make_small_model(folder / "teacher", 1, 64, vocab, 2)
    size, _ = LAYOUTS[options.layout]
    arguments = (str(model), str(teacher), str(folder), settings)
    with ProcessGroup(size, Saves, *arguments, device=settings["device"], threads=options.threads) as group:

        def slowest(mode: str) -> dict[str, Any]:
            """Of the ranks' results, the one that the others wait for."""
            return max(group.call("step", mode), key=lambda r: r.get("stall", 0))

        measures = {mode: partial(slowest, mode) for mode in MODES}
        found = alternate(measures, options.repeats)
        load = max(group.call("load", "synchronous"))
        memory = group.call("memory")
    newest = max((folder / "synchronous" / "checkpoints").glob("step_*"))
    files = [path for path in newest.rglob("*") if path.is_file()]
    step = summary([r["step"] for mode in MODES for r in found[mode]])
    results: dict[str, Any] = {
        "step_s": step,
        "size_bytes": sum(path.stat().st_size for path in files),
        "model_bytes": sum(path.stat().st_size for path in files if path.parent.name == "megatron"),
        "load_s": load,
        "peak_memory_bytes": memory,
    }
    for mode in MODES[1:]:
        rounds = found[mode]
        during = [seconds for r in rounds for seconds in r["during"]]
        results[mode] = {
            "stall_s": summary([r["stall"] for r in rounds]),
            "stall_of_step": summary([r["stall"] / step["median"] for r in rounds]),
            "copy_s": summary([r["copy"] for r in rounds]),
            "complete_s": summary([r["done"] for r in rounds]),
            "steps_beside": [len(r["during"]) for r in rounds],
            "step_beside_s": summary(during) if during else None,
        }
    return results


def report(results: dict[str, Any], settings: dict[str, Any]) -> None:
    rows = [["no save", shown(results["step_s"]), "", "", "", ""]]
    for mode in MODES[1:]:
        r = results[mode]
        beside = shown(r["step_beside_s"]) if r["step_beside_s"] else ""
        rows.append(
            [mode, "", shown(r["stall_s"]), shown(r["stall_of_step"], "%", 100), beside, shown(r["complete_s"])]
        )
    sizes = [
        f"{n / 2**30:.2f} GiB" if n > 2**30 else f"{n / 2**20:.1f} MiB"
        for n in (results["size_bytes"], results["model_bytes"])
    ]
    title = (
        f"saving at {settings['layout']}, {settings['precision']}: {sizes[0]}, of which {sizes[1]} the model; "
        f"loaded in {results['load_s']:.1f} s"
    )
    columns = ("save", "step", "training waits", "of a step", "step beside the save", "complete after")
    print_table(title, columns, rows)
