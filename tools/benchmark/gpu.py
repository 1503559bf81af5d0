"""`gpu`: kernels, the loss's memory, training, scoring, whole steps and FP8 on one GPU; each part in its own process.

A part that fails or runs out of its time keeps what it has measured, and the others run all the same. Parts that are
measured one by one collect in the same file. Without a GPU `--sizes tiny` runs the scripts, not the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.common import REPOSITORY, BenchmarkError, print_table, resolve_device, write_json
from benchmark.gpu_common import SIZES

PARTS = {  # name: most seconds
    "kernels": 240,
    "memory": 180,
    "train": 560,
    "score": 300,
    "steps": 560,
    "fp8": 560,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "all"), default=["all"])
    parser.add_argument("--sizes", choices=SIZES, default="full", help="tiny: for a test of the scripts on any machine")
    parser.add_argument("--limit-s", type=float, help="most seconds of each part, instead of its own limit")


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    if device == "cpu" and options.sizes == "full":
        raise BenchmarkError("torch finds no GPU and nothing can be measured; --sizes tiny runs the scripts on a CPU")
    path = Path(options.json)
    results = earlier(path, options.sizes)
    parts = list(PARTS) if "all" in options.part else options.part
    for part in parts:
        limit = options.limit_s or PARTS[part]
        print(f"{part}: at most {limit:.0f} s", flush=True)
        results[part] = run_part(part, device, options.sizes, limit)
        show(part, results[part])
        results["teacher cost"] = teacher_cost(results)
        settings = {"sizes": options.sizes} | SIZES[options.sizes]
        write_json(path, "gpu", settings, {"machine": machine(device)} | results, device)
    return 1 if any(results[part]["status"] != "finished" for part in parts) else 0


def earlier(path: Path, sizes: str) -> dict[str, Any]:
    """Parts of an earlier call at the same sizes."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if report.get("settings", {}).get("sizes") != sizes:
        return {}
    return {name: part for name, part in report["results"].items() if name in PARTS}


def run_part(part: str, device: str, sizes: str, limit: float) -> dict[str, Any]:
    """One part in a process of its own; its entries so far, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "entries.json")
        worker = Path(__file__).with_name("gpu_worker.py")
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, str(worker), part, device, sizes, str(out)], env=env)
        try:
            code = process.wait(limit)
            status = "finished" if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"stopped after {limit:.0f} s"
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": status,
            "seconds": time.monotonic() - started,
            "entries": json.loads(out.read_text()) if out.exists() else [],
        }


def teacher_cost(results: dict[str, Any]) -> list[dict[str, Any]]:
    """How many tokens a teacher can score in the time that one token of a student's training takes."""

    def rates(part: str) -> list[dict[str, Any]]:
        entries = results.get(part, {}).get("entries", [])
        return [e for e in entries if "tokens_per_s" in e and e.get("optimizer", True)]

    return [
        {
            "student": own["model"],
            "student_precision": own["precision"],
            "teacher": other["model"],
            "teacher_precision": other["precision"],
            "teacher_tokens_per_student_token": other["tokens_per_s"] / own["tokens_per_s"],
        }
        for own in rates("train")
        for other in rates("score")
    ]


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to, beside the packages' versions."""
    import torch

    if device == "cpu":
        return {}
    asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver, power limit, clock": driver[:1],
    }


def show(part: str, result: dict[str, Any]) -> None:
    """A table for each kind of entry, and what failed; nested values are left to the file."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for entry in (e for e in result["entries"] if "error" not in e):
        plain = {key: value for key, value in entry.items() if key != "at" and not isinstance(value, (dict, list))}
        kinds.setdefault(tuple(plain), []).append([_text(value) for value in plain.values()])
    for columns, rows in kinds.items():
        print_table(f"{part}: {result['status']}, {result['seconds']:.0f} s", columns, rows, left=2)
    for entry in (e for e in result["entries"] if "error" in e):
        what = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("at", "error"))
        print(f"{part}, {what}: {entry['error']}")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
