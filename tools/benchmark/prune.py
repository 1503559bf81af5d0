"""`prune`: time to accuracy on both pairs of the embedded example: full and short budget, paper, in_flight."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.common import REPOSITORY, BenchmarkError, last_of_each, print_table, resolve_device, write_json
from megatron_opd.records.lines import read_steps

EXAMPLE = REPOSITORY / "examples" / "tiny"
METHODS = {
    "off": "full budget",
    "short": "short budget",
    "paper": "paper",
    "in_flight": "in flight",
    "watch": "full budget, watched",
}
# The student's two most likely tokens are the signal: tiny models order the tail of their distributions by noise. The
# full budget is six times the first one, as in the published runs (12288 and 2048).
FULL_BUDGET = 1536
SETTINGS = ("prune.k=2", "loss.k=8", f"prune.budget.maximum={FULL_BUDGET}")
WATCH = ("prune.threshold=0", "prune.w_base=0")  # overlap and reliability are computed and change nothing
COLORS = {"watch": "#2da44e", "off": "#8a8f98", "short": "#8250df", "paper": "#1f6feb", "in_flight": "#d9730d"}
SAVING = ("seconds", "tokens_generated", "tokens_trained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", nargs="+", default=["drifting", "close"], help="names of examples/tiny/NAME.yaml")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["off", "short", "paper", "in_flight"],
        help="watch: paper whose threshold never fires, so that only the cost of watching is left",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, train.seed = 1, 2, ...")
    parser.add_argument("--short", type=int, default=128, help="the fixed short budget, in tokens")
    parser.add_argument("--w-drop", type=float, default=0.05, help="for in_flight; the others have the published 0.01")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/prune"), help="runs and the plot")
    parser.add_argument("--again", action="store_true", help="run those, too, that have finished before")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, e.g. train.steps=2")


def own_settings(options: argparse.Namespace, method: str) -> list[str]:
    """What tells a method's config from the others'."""
    if method == "watch":
        return ["prune.preset=paper", *WATCH, *(f"prune.budget.{k}={FULL_BUDGET}" for k in ("initial", "minimum"))]
    if method == "short":
        return ["prune.preset=off", *(f"prune.budget.{k}={options.short}" for k in ("initial", "minimum", "maximum"))]
    return [f"prune.preset={method}", *([f"prune.w_drop={options.w_drop}"] if method == "in_flight" else [])]


def train(
    options: argparse.Namespace,
    pair: str,
    seed: int,
    settings_of: Callable[[argparse.Namespace, str], list[str]] = own_settings,
) -> list[dict[str, Any]]:
    """All methods from one seed, in turns step by step; what finished before is only read."""
    run_dir = (options.out / f"{pair}-{seed}").resolve()
    shared = last_of_each([*SETTINGS, *options.overrides, f"train.seed={seed}"])
    variants = []
    for method in options.methods:
        first = seed == 1 and method == options.methods[0]
        own = [*settings_of(options, method), f"eval.at_start={str(first).lower()}"]
        variants += ["--variant", method, *own]
    done = run_dir / "done.json"
    if options.again or not done.exists() or json.loads(done.read_text()) != [*shared, *variants]:
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        print(f"== {pair}, seed {seed}", flush=True)
        command = [
            sys.executable,
            "-m",
            "megatron_opd.cli",
            "compare",
            str(EXAMPLE / f"{pair}.yaml"),
            f"run_dir={run_dir}",
            *shared,
            "--nproc",
            str(options.processes),
            *variants,
        ]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        log = run_dir / "output.txt"
        started = time.perf_counter()
        with log.open("w") as output:
            code = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            raise BenchmarkError(f"{pair} seed {seed} ended with exit code {code}:\n{log.read_text()[-3000:]}")
        print(f"   {time.perf_counter() - started:.0f} s, evaluations and start included", flush=True)
        done.write_text(json.dumps([*shared, *variants]))
    return [read(run_dir / method, pair, method, seed) for method in options.methods]


def read(run_dir: Path, pair: str, method: str, seed: int) -> dict[str, Any]:
    """One run's numbers. Seconds are those of training steps; start-up and evaluation are left out."""
    steps = read_steps(run_dir / "metrics.jsonl")
    seconds, trained, points, by_tokens = 0.0, 0, [], []
    start = run_dir / "eval" / "step0.json"
    if start.exists():
        points.append((0.0, _first(json.loads(start.read_text())["accuracy"])))
    for step in steps:
        seconds += step["step_s"]
        trained += step["tokens_trained"]
        if "accuracy" in step:
            points.append((seconds, _first(step["accuracy"])))
            by_tokens.append((trained, points[-1][1]))
    if not points or "accuracy" not in steps[-1]:
        raise BenchmarkError(f"{run_dir} has no evaluation after its last step; set eval.at_end and eval.sets")
    return {
        "pair": pair,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "rollout_s": sum(s["rollout_s"] for s in steps),
        "tokens_generated": sum(s["tokens_generated"] for s in steps),
        "tokens_trained": sum(s["tokens_trained"] for s in steps),
        "accuracy": points[-1][1],
        "correct": _correct(run_dir, steps[-1]["step"]),
        "curve": points,
        "curve_by_trained_tokens": by_tokens,
        "budget": [steps[0]["budget"], steps[-1]["budget_next"]],
    }


def _first(values: dict[str, float]) -> float:
    return next(iter(values.values()))


def _correct(run_dir: Path, step: int) -> dict[int, float]:
    """Share of correct responses of each prompt in the last evaluation (of the first set)."""
    name = next(iter(json.loads((run_dir / "eval" / f"step{step}.json").read_text())["accuracy"]))
    found: dict[int, list[float]] = {}
    for line in (run_dir / "eval" / f"{name}-step{step}.jsonl").read_text().splitlines():
        response = json.loads(line)
        found.setdefault(response["uid"], []).append(float(response["correct"]))
    return {uid: statistics.mean(values) for uid, values in sorted(found.items())}


def interval(runs: list[dict[str, Any]], base: list[dict[str, Any]] | None = None) -> tuple[float, float]:
    """95% bootstrap interval of the accuracy (less that of `base`, pairwise) over prompts and seeds together."""
    import numpy as np

    table = np.array([list(r["correct"].values()) for r in runs])
    if base is not None:
        table = table - np.array([list(r["correct"].values()) for r in base])
    generator = np.random.default_rng(0)
    seeds, prompts = table.shape
    means = [
        table[generator.integers(0, seeds, seeds)][:, generator.integers(0, prompts, prompts)].mean()
        for _ in range(2000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(runs: list[dict[str, Any]], pairs: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """One entry per pair and method, against the first method seed by seed."""
    entries = []
    for pair in pairs:
        base = [r for r in runs if r["pair"] == pair and r["method"] == methods[0]]
        for method in methods:
            own = [r for r in runs if r["pair"] == pair and r["method"] == method]
            entry: dict[str, Any] = {"pair": pair, "method": method}
            entry["accuracy"] = statistics.mean(r["accuracy"] for r in own)
            entry["accuracy_interval"] = interval(own)
            entry["accuracy_gain"] = entry["accuracy"] - statistics.mean(r["accuracy"] for r in base)
            entry["accuracy_gain_interval"] = interval(own, base)
            for key in SAVING:
                entry[key] = statistics.median(r[key] for r in own)
                saved = [1 - r[key] / b[key] for r, b in zip(own, base)]
                entry[f"{key}_saved"] = statistics.median(saved)
                entry[f"{key}_saved_range"] = [min(saved), max(saved)]
            tokens = sum(r["tokens_generated"] for r in own)
            entry["seconds_per_1000_tokens"] = 1000 * sum(r["seconds"] for r in own) / tokens
            entries.append(entry)
    return entries


def draw(runs: list[dict[str, Any]], pairs: list[str], methods: list[str], path: Path) -> None:
    """Accuracy over wall-clock, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pairs), figsize=(6.5 * len(pairs), 4.5), squeeze=False)
    for axis, pair in zip(axes[0], pairs):
        start = [r["curve"][0] for r in runs if r["pair"] == pair and r["curve"][0][0] == 0.0][:1]
        for method in methods:
            for number, r in enumerate(r for r in runs if r["pair"] == pair and r["method"] == method):
                points = r["curve"] if r["curve"][0][0] == 0.0 else [*start, *r["curve"]]
                label = METHODS[method] if number == 0 else None
                x, y = [p[0] for p in points], [100 * p[1] for p in points]
                axis.plot(x, y, color=COLORS[method], marker="o", markersize=4, alpha=0.8, label=label)
        axis.set(title=f"{pair} pair", xlabel="seconds of training", ylabel="accuracy on held-out prompts (%)")
        axis.grid(alpha=0.25)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"plot: {path}")


def run(options: argparse.Namespace) -> int:
    for pair in options.pairs:
        if not (EXAMPLE / f"{pair}.yaml").exists():
            raise BenchmarkError(f"--pairs {pair}: no {EXAMPLE / f'{pair}.yaml'}")
    jobs = [(pair, seed) for pair in options.pairs for seed in range(1, options.seeds + 1)]
    runs = [result for job in jobs for result in train(options, *job)]
    entries = compare(runs, options.pairs, options.methods)
    rows = []
    for e in entries:
        low, high = e["accuracy_interval"]
        gain_low, gain_high = e["accuracy_gain_interval"]
        first = e["method"] == options.methods[0]
        rows.append(
            [
                e["pair"],
                METHODS[e["method"]],
                f"{100 * e['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
                "" if first else f"{100 * e['accuracy_gain']:+.1f} ({100 * gain_low:+.1f} to {100 * gain_high:+.1f})",
                f"{e['seconds']:.0f} s",
                "" if first else f"{100 * e['seconds_saved']:.1f}%",
                f"{e['tokens_generated']:,.0f}",
                f"{e['tokens_trained']:,.0f}",
                f"{e['seconds_per_1000_tokens']:.2f} s",
            ]
        )
    print_table(
        f"time to accuracy, {options.seeds} seed(s); medians; accuracies with 95% intervals over prompts and seeds",
        (
            "pair",
            "method",
            "accuracy",
            f"against {METHODS[options.methods[0]]}",
            "training time",
            "saved",
            "generated",
            "trained",
            "per 1000 tokens",
        ),
        rows,
        left=2,
    )
    draw(runs, options.pairs, options.methods, options.out / "accuracy.png")
    settings = {
        "seeds": options.seeds,
        "short": options.short,
        "w_drop": options.w_drop,
        "overrides": [*SETTINGS, *options.overrides],
    }
    results = {"summary": entries, "runs": runs}
    write_json(Path(options.json), "prune", settings, results, resolve_device(options.device))
    return 0
