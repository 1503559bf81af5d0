"""The demo: plain on-policy distillation against Prune-OPD on the embedded example, in one measured run.

    make demo        or: python examples/tiny/demo.py [--out runs/demo] [--in-flight] [--quick]

Two pairs of student and teacher. On the drifting pair the student leaves the teacher's path early, so most of what
plain distillation generates is wasted; on the close pair nearly everything is worth generating. The runs of a pair have
the same seed, prompts and number of steps and take turns, a step of each, in the same two processes (`megatron-opd
compare`), so that a machine whose speed drifts favours neither: the student with tensor and sequence parallelism, the
teacher with pipeline parallelism. Prints one table and writes report.html.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.commands.report import report
from megatron_opd.records.lines import read_steps

HERE = Path(__file__).resolve().parent
PAIRS = ("drifting", "close")
NAMES = {
    "off": "plain OPD",
    "paper": "Prune-OPD",
    "in_flight": "Prune-OPD in flight",
    "carry_over": "in flight, carry-over",
}
COLORS = {"off": "#8a8f98", "paper": "#1f6feb", "in_flight": "#d9730d", "carry_over": "#1a7f37"}
# In flight, and no step waits for its longest response: on the pair whose responses are of very different lengths
CARRY_OVER = ("prune.preset=in_flight", "rollout.carry_over=finished", "rollout.oversubscribe=2")


@dataclass
class Result:
    """One training run, read back from its directory."""

    pair: str
    preset: str
    steps: list[dict]  # metrics.jsonl
    before: float  # accuracy of the student it started from; measured once per pair

    @property
    def seconds(self) -> float:
        """Wall-clock of all training steps; start-up and evaluation are the same for every preset and left out."""
        return sum(s["step_s"] for s in self.steps)

    @property
    def accuracy(self) -> list[tuple[int, float]]:
        return [(s["step"], next(iter(s["accuracy"].values()))) for s in self.steps if "accuracy" in s]

    def total(self, key: str) -> int:
        return sum(s[key] for s in self.steps)


def train(pair: str, presets: list[str], out: Path, overrides: list[str]) -> list[Result]:
    """Runs a pair's trainings, step by step in turns, in processes of their own."""
    run_dir = out / pair
    shutil.rmtree(run_dir, ignore_errors=True)
    print(f"\n== {pair} pair: {', '.join(NAMES[preset] for preset in presets)}", flush=True)
    command = [
        sys.executable,
        "-m",
        "megatron_opd.cli",
        "compare",
        str(HERE / f"{pair}.yaml"),
        f"run_dir={run_dir}",
        *overrides,
        "--nproc",
        "2",
    ]
    for preset in presets:  # they start from the same student: one of them measures it
        settings = CARRY_OVER if preset == "carry_over" else (f"prune.preset={preset}",)
        command += ["--variant", preset, *settings, f"eval.at_start={str(preset == 'off').lower()}"]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"demo: the {pair} pair ended with exit code {code}")
    before = next(iter(json.loads((run_dir / "off" / "eval" / "step0.json").read_text())["accuracy"].values()))
    return [Result(pair, p, read_steps(run_dir / p / "metrics.jsonl"), before) for p in presets]


def table(results: list[Result]) -> list[list[str]]:
    rows = []
    for r in results:
        plain = next(x for x in results if x.pair == r.pair and x.preset == "off")
        saved = 1 - r.seconds / plain.seconds
        rows.append(
            [
                r.pair,
                NAMES[r.preset],
                f"{100 * r.before:.1f}%",
                f"{100 * r.accuracy[-1][1]:.1f}%",
                f"{r.seconds:.0f} s",
                f"{r.total('tokens_generated'):,}",
                f"{r.total('tokens_trained'):,}",
                f"{r.steps[0]['budget']} to {r.steps[-1]['budget_next']}",
                "" if r is plain else f"{100 * saved:.1f}%",
            ]
        )
    return rows


HEAD = [
    "pair",
    "method",
    "before",
    "after",
    "training time",
    "tokens generated",
    "tokens trained",
    "budget",
    "time saved",
]


def print_table(rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="accuracy on held-out prompts, before and after training")
    for i, name in enumerate(HEAD):
        shown.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        shown.add_row(*row)
    Console(width=150 if not sys.stdout.isatty() else None).print(shown)


def draw(results: list[Result]) -> bytes:
    """Budget, effective length, overlap and accuracy over steps, and accuracy over time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = list(dict.fromkeys(r.pair for r in results))
    figure, axes = plt.subplots(len(pairs), 5, figsize=(19, 3.6 * len(pairs)), squeeze=False)
    for row, pair in zip(axes, pairs):
        for r in (r for r in results if r.pair == pair):
            style = {"color": COLORS[r.preset], "label": NAMES[r.preset], "linewidth": 1.8}
            x = [s["step"] for s in r.steps]
            row[0].plot(x, [s["budget"] for s in r.steps], **style)
            row[1].plot(x, [s["effective_length_mean"] for s in r.steps], **style)
            if all(s["overlap_mean"] is not None for s in r.steps):
                row[2].plot(x, [s["overlap_mean"] for s in r.steps], **style)
            points = [(0, r.before), *r.accuracy]
            row[3].plot([p[0] for p in points], [100 * p[1] for p in points], marker="o", **style)
            clock = {s["step"]: sum(t["step_s"] for t in r.steps[: i + 1]) for i, s in enumerate(r.steps)}
            row[4].plot([clock.get(p[0], 0.0) for p in points], [100 * p[1] for p in points], marker="o", **style)
        titles = ("budget (tokens)", "effective length (tokens)", "top-k overlap", "accuracy (%)", "accuracy (%)")
        for axis, title in zip(row, titles):
            axis.set_title(f"{pair}: {title}", fontsize=10)
            axis.set_xlabel("step" if axis is not row[4] else "seconds of training")
            axis.grid(alpha=0.25)
        row[0].legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="two steps of each run, to see that everything works")
    parser.add_argument("--in-flight", action="store_true", help="also stop responses while they are generated")
    options, overrides = parser.parse_known_args()
    presets = ["off", "paper", "in_flight"] if options.in_flight else ["off", "paper"]
    of_pair = {"drifting": [*presets, "carry_over"], "close": presets}
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        overrides += ["train.steps=2", "eval.sets.0.limit=8"]
    started = time.time()
    results = [result for pair in PAIRS for result in train(pair, of_pair[pair], out, overrides)]
    rows = table(results)
    (out / "report.png").write_bytes(draw(results))
    print()
    print_table(rows)
    page = out / "report.html"
    report([str(out / r.pair / r.preset) for r in results], str(page))
    print(
        f"{time.time() - started:.0f} s in all; curves, and responses token by token: open {page.as_uri()} in a browser"
    )


if __name__ == "__main__":
    main()
