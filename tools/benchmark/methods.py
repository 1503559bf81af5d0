"""`methods`: Prune-OPD and its published relatives (docs/methods.md) on the embedded example.

From the same models, prompts and seeds, a step of each in turns; compared at equal steps and equal trained tokens."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmark import prune
from benchmark.common import BenchmarkError, print_table, resolve_device, write_json

# Budgets are those of the published runs, scaled to the example's: a full budget of six first ones (12288 and 2048).
FULL, FIRST = prune.FULL_BUDGET, prune.FULL_BUDGET // 6
STAIRS = f"prune.budget={{initial: {FIRST}, minimum: {FIRST}, step: {FIRST}, patience: 2, maximum: {FULL}}}"
SHORT_STAIRS = f"prune.budget={{initial: {FIRST // 4}, minimum: 16, step: {FIRST // 4}, patience: 2, maximum: {FULL}}}"
METHODS: dict[str, tuple[str, ...]] = {
    "off": ("prune.preset=off",),
    "paper": ("prune.preset=paper",),
    "in_flight": ("prune.preset=in_flight", "prune.w_drop=0.05"),
    "topd": ("prune.preset=topd",),
    "topd_tenth": ("prune.preset=topd", "prune.budget.share=0.1"),
    "popd": ("prune.preset=popd", STAIRS),
    "prefix": ("prune.preset=prefix", SHORT_STAIRS),
    "iw": ("prune.preset=iw",),
    "tip": ("prune.preset=tip",),
    "random_window": ("prune.preset=random_window",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", nargs="+", default=["drifting", "close"], help="names of examples/tiny/NAME.yaml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, train.seed = 1, 2, ...")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark/methods"), help="the runs")
    parser.add_argument("--again", action="store_true", help="run those, too, that have finished before")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, e.g. train.steps=2")


def own_settings(options: argparse.Namespace, method: str) -> list[str]:
    """What tells a method's config from the others'."""
    return list(METHODS[method])


def accuracy_at(curve: list[tuple[int, float]], tokens: int) -> float:
    """The accuracy of a run when it has trained on that many tokens, between its evaluations by a straight line.

    Before the first evaluation it is the first one's.
    """
    before = curve[0]
    for point in curve:
        if point[0] >= tokens:
            span = point[0] - before[0]
            return point[1] if not span else before[1] + (point[1] - before[1]) * (tokens - before[0]) / span
        before = point
    return before[1]


def at_equal_tokens(runs: list[dict[str, Any]]) -> tuple[int, dict[str, list[float]]]:
    """The trained tokens that every run has reached, and each method's accuracies there, a number a seed."""
    common = min(r["curve_by_trained_tokens"][-1][0] for r in runs)
    there: dict[str, list[float]] = {}
    for r in runs:
        there.setdefault(r["method"], []).append(accuracy_at(r["curve_by_trained_tokens"], common))
    return common, there


def percent(values: tuple[float, float] | list[float], sign: str = "") -> str:
    """From the lowest to the highest, in percent."""
    return f"({100 * min(values):{sign}.1f} to {100 * max(values):{sign}.1f})"


def row_of(entry: dict[str, Any]) -> list[str]:
    """One line of the table."""
    there, plain = entry["accuracy_at_equal_tokens"], entry["method"] == "off"
    gain = f"{100 * entry['accuracy_gain']:+.1f} {percent(entry['accuracy_gain_interval'], '+')}"
    return [
        entry["pair"],
        entry["method"],
        f"{100 * entry['accuracy']:.1f}% {percent(entry['accuracy_interval'])}",
        "" if plain else gain,
        f"{100 * statistics.mean(there):.1f}% {percent(there)}",
        f"{entry['seconds']:.0f} s",
        f"{entry['tokens_generated']:,.0f}",
        f"{entry['tokens_trained']:,.0f}",
    ]


def run(options: argparse.Namespace) -> int:
    if options.methods[0] != "off":
        raise BenchmarkError("--methods must begin with off: the others are compared with it, seed by seed")
    for pair in options.pairs:
        if not (prune.EXAMPLE / f"{pair}.yaml").exists():
            raise BenchmarkError(f"--pairs {pair}: no {prune.EXAMPLE / f'{pair}.yaml'}")
    jobs = [(pair, seed) for pair in options.pairs for seed in range(1, options.seeds + 1)]
    runs = [result for job in jobs for result in prune.train(options, *job, own_settings)]
    entries = prune.compare(runs, options.pairs, options.methods)
    for pair in options.pairs:
        common, there = at_equal_tokens([r for r in runs if r["pair"] == pair])
        for entry in (e for e in entries if e["pair"] == pair):
            entry |= {"equal_trained_tokens": common, "accuracy_at_equal_tokens": there[entry["method"]]}
    print_table(
        f"methods, {options.seeds} seed(s); accuracies with 95% intervals over prompts and seeds; at equal trained "
        "tokens the range of the seeds",
        (
            "pair",
            "method",
            "accuracy",
            "against off",
            "at equal trained tokens",
            "training time",
            "generated",
            "trained",
        ),
        [row_of(entry) for entry in entries],
        left=2,
    )
    settings = {"seeds": options.seeds, "methods": METHODS, "overrides": [*prune.SETTINGS, *options.overrides]}
    results = {"summary": entries, "runs": runs}
    write_json(Path(options.json), "methods", settings, results, resolve_device(options.device))
    return 0
