"""`train`: whole on-policy distillation steps side by side with TRL's trainer, on the same models and prompts."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmark.common import (
    REPOSITORY,
    START_S,
    BenchmarkError,
    ProcessGroup,
    alternate,
    print_table,
    resolve_device,
    shown,
    summary,
    write_json,
)
from benchmark.trl_worker import MARK
from megatron_opd.training.clock import PHASE_KEYS

EXAMPLE = REPOSITORY / "examples" / "tiny"
MAX_STEPS = 500  # of one benchmark: TRL gets its prompts beforehand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", type=Path, default=EXAMPLE / "models" / "student_drift")
    parser.add_argument("--teacher", type=Path, default=EXAMPLE / "models" / "teacher")
    parser.add_argument("--prompts", type=Path, default=EXAMPLE / "prompts" / "train.jsonl")
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--responses-per-prompt", "--answers-per-prompt", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="most of one response, for both")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of each side")
    parser.add_argument("--presets", nargs="+", default=["off", "in_flight"], help="ours: values of prune.preset")
    parser.add_argument("--k", type=int, default=4, help="candidates of our top-k loss")
    parser.add_argument("--w-drop", type=float, default=0.05, help="for the presets that prune")
    parser.add_argument("--segment", type=int, default=32, help="for in_flight")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each side before the clock counts")
    parser.add_argument("--trl-version", default="1.16.0")
    parser.add_argument("--trl-venv", type=Path, default=REPOSITORY / ".venv-trl", help="made where it is missing")


class Ours:
    """One rank with a run for each preset."""

    def __init__(self, rank: int, size: int, values: dict[str, dict]) -> None:
        from megatron_opd.config import parse_config
        from megatron_opd.training.run import Run

        self.runs = {preset: Run(parse_config(v)) for preset, v in values.items()}

    def step(self, preset: str) -> dict[str, Any]:
        """One step's metrics, and the seconds until every rank is done."""
        from benchmark.common import clocked
        from megatron_opd.training.loop import step

        seconds, metrics = clocked(lambda: step(self.runs[preset]))
        return {"seconds": seconds, "tokens": metrics["tokens_generated"], "trained": metrics["tokens_trained"]} | {
            phase: metrics[phase] for phase in PHASE_KEYS
        }

    def finish(self) -> None:
        for run in reversed(self.runs.values()):  # each restores the signal handlers that it found
            run.close()


class Trl:
    """TRL's trainer in `processes` processes of its own environment; `step` runs one step."""

    def __init__(self, python: Path, settings: dict[str, Any], processes: int, folder: Path) -> None:
        spec = folder / "trl.json"
        spec.write_text(json.dumps(settings))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "OMP_NUM_THREADS": str(settings["threads"]),
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONWARNINGS": "ignore",
        }
        script = Path(__file__).with_name("trl_worker.py")
        self.log = folder / "trl.log"
        self.processes = []
        with self.log.open("w") as log:
            for rank in range(processes):
                self.processes.append(
                    subprocess.Popen(
                        [str(python), str(script), str(spec)],
                        env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else log,
                        stderr=log,
                        text=True,
                    )
                )
        self.versions = self._answer()

    def step(self) -> dict[str, Any]:
        stream = self.processes[0].stdin
        assert stream is not None
        stream.write("go\n")
        stream.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stream = self.processes[0].stdout
        assert stream is not None
        for line in stream:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        text = self.log.read_text()[-3000:]
        raise BenchmarkError(f"TRL's trainer ended:\n{text}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def trl_environment(folder: Path, wanted: str) -> Path:
    """The Python of an environment that has TRL beside this one's packages, which stay as they are."""
    python = folder / "bin" / "python"
    check = [str(python), "-c", "import sys, trl; sys.exit(trl.__version__ != sys.argv[1])", wanted]
    if python.exists() and subprocess.run(check, capture_output=True).returncode == 0:
        return python
    print(f"installing TRL {wanted} into {folder}, once")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (folder / ".gitignore").write_text("*\n")
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # torch and transformers are ours
    packages = [f"trl=={wanted}", "accelerate", "datasets"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    code = subprocess.run(command, timeout=2 * START_S).returncode
    if code or subprocess.run(check, capture_output=True).returncode:
        raise BenchmarkError(f"cannot install {' '.join(packages)} into {folder}; see above")
    return python


def our_config(options: argparse.Namespace, preset: str, device: str, folder: Path) -> dict[str, Any]:
    """Data parallelism only, as TRL's; the budget stays at --tokens."""
    side = {"precision": "fp32", "parallel": {}}
    prune: dict[str, Any] = {"preset": preset, "k": options.k, "segment": options.segment}
    if preset != "off":
        prune["w_drop"] = options.w_drop
    prune["budget"] = {"initial": options.tokens, "minimum": options.tokens, "maximum": options.tokens}
    return {
        "run_dir": str(folder / preset),
        "device": device,
        "student": {"model": str(options.student.resolve()), **side},
        "teacher": {"model": str(options.teacher.resolve()), **side},
        "prune": prune,
        "train": {
            "steps": MAX_STEPS,
            "prompts_per_step": options.prompts_per_step,
            "lr": 1e-6,
            "responses_per_prompt": options.responses_per_prompt,
            "tokens_per_microbatch": 8192,
        },
        "data": {"prompts": str(options.prompts.resolve()), "template": "none"},
        "eval": {"every": 0, "at_end": False},
        "checkpoint": {"every": 0},
    }


def trl_settings(options: argparse.Namespace, values: dict[str, Any], device: str) -> dict[str, Any]:
    """The same prompts, in the same order, as our loader hands out."""
    from megatron_opd.config import parse_config
    from megatron_opd.data.loader import PromptLoader
    from megatron_opd.data.prompts import load_prompts
    from megatron_opd.data.tokenizer import load_tokenizer

    config = parse_config(values)
    tokenizer = load_tokenizer(config.student.model)
    loader = PromptLoader(load_prompts(config.data, tokenizer), config.train.seed)
    steps = options.repeats + options.warmup + 1
    prompts = loader.next_batch(steps * options.prompts_per_step)
    rows = [prompt.tokens for prompt in prompts for _ in range(options.responses_per_prompt)]
    return {
        "student": config.student.model,
        "teacher": config.teacher.model,
        "prompts": rows,
        "device": device,
        "rows_per_step": options.prompts_per_step * options.responses_per_prompt,
        "tokens": options.tokens,
        "pad_id": tokenizer.pad_id,
        "eos_id": min(tokenizer.eos_ids),
        "vocab": tokenizer.vocab_size,
        "lr": config.train.lr,
        "seed": config.train.seed,
        "threads": options.threads,
    }


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    rows_per_step = options.prompts_per_step * options.responses_per_prompt
    if rows_per_step % options.processes:
        raise SystemExit(
            f"--processes {options.processes} must divide {rows_per_step} responses: TRL splits them evenly"
        )
    if options.repeats + options.warmup >= MAX_STEPS:
        raise SystemExit(f"--repeats and --warmup together must stay below {MAX_STEPS}")
    python = trl_environment(options.trl_venv, options.trl_version)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = {preset: our_config(options, preset, device, folder) for preset in options.presets}
        settings = trl_settings(options, values[options.presets[0]], device)
        ours = ProcessGroup(options.processes, Ours, values, device=device, threads=options.threads)
        trl = None
        try:
            trl = Trl(python, settings, options.processes, folder)
            measures: dict[str, Any] = {p: (lambda p=p: ours.call("step", p)[0]) for p in options.presets}
            measures["trl"] = trl.step
            found = alternate(measures, options.repeats, warmup=options.warmup)
            ours.call("finish")
            versions = trl.versions
        finally:
            if trl is not None:
                trl.close()
            ours.close(kill=True)
    report(options, found, settings, versions, device)
    return 0


def report(options: argparse.Namespace, found: dict, settings: dict, versions: dict, device: str) -> None:
    results: dict[str, Any] = {"trl_versions": versions}
    rows = []
    for name, steps in found.items():
        entry = {
            "seconds": summary([s["seconds"] for s in steps]),
            "tokens_per_second": summary([s["tokens"] / s["seconds"] for s in steps]),
            "tokens": summary([s["tokens"] for s in steps]),
            "phases": {k: summary([s[k] for s in steps])["median"] for k in steps[0] if k.endswith("_s")},
        }
        if name != "trl":
            entry["tokens_trained"] = summary([s["trained"] for s in steps])
        results[name] = entry
    for name, entry in results.items():
        if name == "trl_versions":
            continue
        entry["step_speed_of_trl"] = results["trl"]["seconds"]["median"] / entry["seconds"]["median"]
        entry["token_speed_of_trl"] = (
            entry["tokens_per_second"]["median"] / results["trl"]["tokens_per_second"]["median"]
        )
        phases = "  ".join(f"{k.removesuffix('_s')} {v:.2f}" for k, v in entry["phases"].items() if v >= 0.005)
        rows.append(
            [
                f"TRL {versions['trl']} DistillationTrainer" if name == "trl" else f"megatron_opd, preset {name}",
                shown(entry["seconds"]),
                f"{entry['tokens']['median']:.0f}",
                shown(entry["tokens_per_second"], "tok/s"),
                f"{entry['token_speed_of_trl']:.2f}x",
                f"{entry['step_speed_of_trl']:.2f}x",
                phases,
            ]
        )
    print_table(
        f"whole steps: {settings['rows_per_step']} responses of up to {options.tokens} tokens, {options.processes} "
        f"processes of {options.threads} thread(s), fp32",
        ("trainer", "step: median, quartiles", "tokens", "tokens per second", "of TRL", "steps of TRL", "seconds in"),
        rows,
    )
    keys = ("prompts_per_step", "responses_per_prompt", "tokens", "processes", "threads", "k", "w_drop", "segment")
    chosen = {k: getattr(options, k) for k in keys} | {"student": str(options.student), "teacher": str(options.teacher)}
    write_json(Path(options.json), "train", chosen, results, device)
