"""What a report shows of a run, as plain data for the page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from megatron_opd.records.run_folder import RunFolder, flat_settings
from megatron_opd.training.clock import PHASE_KEYS

TOKENS = 40_000  # response tokens in a report, over all runs: about 3 MB
LONGEST = 8_000  # of one response
POINTS = 2_000  # of a curve: longer runs show every second step, or every third
SECRET = re.compile(r"(^|[_.\-])(api_?key|key|token|secret|password|passwd|credentials?)($|[_.\-])", re.IGNORECASE)
ABSOLUTE = re.compile(r"^(file://)?/.*/([^/]+)/?$")
PHASES = (*PHASE_KEYS, "checkpoint_s")


def shown_setting(key: str, value: str) -> str:
    """Without what should not travel in a mail: folders of this machine, and what may be a key."""
    if SECRET.search(key) and key.rpartition(".")[2] not in ("prompt_key", "answer_key", "source_key", "context_key"):
        return "(not shown)"
    if match := ABSOLUTE.match(value):
        return f".../{match[2]}"
    return re.sub(r"(?<![\w.:/])/(?:[^/\s\"',\]}]+/)+", ".../", value)


def series(steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of numbers by name, inner objects by NAME/INNER, None where a step has none."""
    columns: dict[str, list[Any]] = {}

    def put(prefix: str, values: dict[str, Any], row: int) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                put(f"{prefix}{key}/", value, row)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                columns.setdefault(prefix + key, [None] * len(steps))[row] = _short(value)

    for row, step in enumerate(steps):
        put("", step, row)
    return columns


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def run_data(run: RunFolder, responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything of one run but the settings that all runs share."""
    every = max(1, -(-len(run.steps) // POINTS))
    steps = [step for i, step in enumerate(run.steps) if i % every == 0 or step is run.steps[-1] or "accuracy" in step]
    return {
        "name": run.name,
        "state": run.state,
        "wanted": run.wanted_steps,
        "starts": [
            {
                key: _text(start.get(key))
                for key in ("time", "step", "processes", "job", "device", "version", "revision")
            }
            for start in run.starts
        ],
        "series": series(steps),
        "every": every,
        "events": [event for step in run.steps for event in _events(step)],
        "positions": positions(run.positions),
        "totals": totals(run),
        "groups": groups(run),
        "responses": responses,
    }


def _text(value: Any) -> Any:
    return value if isinstance(value, int) else str(value or "")


def _events(step: dict[str, Any]) -> list[dict[str, Any]]:
    """What a curve should be marked with: alarms, steps that were skipped, warnings."""
    marks = []
    if isinstance(step.get("alarms"), list) and step["alarms"]:
        marks.append({"step": step["step"], "kind": "alarm", "text": ", ".join(map(str, step["alarms"]))})
    for kind in ("skipped", "warning"):
        if isinstance(step.get(kind), str) and step[kind]:
            marks.append({"step": step["step"], "kind": kind, "text": step[kind]})
    return marks


def positions(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Heat maps over steps (columns) and bins of positions (rows): mean overlap, events per 100 tokens, spent."""
    good = [line for line in lines if isinstance(line.get("tokens"), list) and isinstance(line.get("width"), int)]
    if not good:
        return None
    every = max(1, len(good) // 200)
    good = good[::every]
    width, bins = max(line["width"] for line in good), max(len(line["tokens"]) for line in good)

    def rows(of: Callable[[dict[str, Any], int], Any]) -> list[list[Any]]:
        return [[of(line, b) if b < len(line["tokens"]) else None for line in good] for b in range(bins)]

    def rate(line: dict[str, Any], b: int) -> Any:
        tokens = line["tokens"][b]
        return round(100 * line["events"][b] / tokens, 2) if tokens else None

    return {
        "steps": [line["step"] for line in good],
        "at": [b * width for b in range(bins)],
        "overlap": rows(lambda line, b: line["overlap"][b]),
        "events": rows(rate),
        "spent": rows(lambda line, b: line["spent"][b] if b < len(line["spent"]) else 0),
        "tokens": rows(lambda line, b: line["tokens"][b]),
    }


def totals(run: RunFolder) -> dict[str, Any]:
    """Sums over the run: seconds, tokens, and what generating to the longest budget would have cost."""

    def total(key: str) -> float:
        return sum(step[key] for step in run.steps if isinstance(step.get(key), int | float))

    longest = _inner(run.config, "prune", "budget", "maximum")
    responses = sum(sum(step["ended"].values()) for step in run.steps if isinstance(step.get("ended"), dict))
    processes = next((s["processes"] for s in reversed(run.starts) if isinstance(s.get("processes"), int)), None)
    sampled = total("tokens_generated")
    seconds = total("step_s")
    return {
        "seconds": seconds,
        "phases": {key: total(key) for key in PHASES},
        "processes": processes,
        "device": str(run.starts[-1].get("device", "")) if run.starts else "",
        "device_hours": seconds * processes / 3600 if processes else None,
        "responses": responses,
        "sampled": sampled,
        "kept": total("tokens_kept"),
        "scored": total("tokens_scored"),
        "trained": total("tokens_trained"),
        "to_the_cap": longest * responses if isinstance(longest, int) else None,
        "tokens_per_s": sampled / seconds if seconds else None,
        "accuracy": run.accuracy,
        "starts": len(run.starts),
    }


def _inner(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def groups(run: RunFolder) -> list[dict[str, Any]]:
    """The recorded responses by source of their prompts and by teacher."""
    members: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for _, _, response in run.responses():
        members[str(response.get("source", "")), str(response.get("teacher", ""))].append(response)
    return [
        {
            "source": source,
            "teacher": teacher,
            "responses": len(those),
            "length": _mean(r.get("length") for r in those),
            "effective": _mean(r.get("effective_length") for r in those),
            "events": _mean(r.get("events") for r in those),
            "overlap": _mean(v for r in those for v in (r.get("overlap") or ())),
            "ended": {end: sum(r.get("end_reason") == end for r in those) for end in ("eos", "length", "drift")},
        }
        for (source, teacher), those in sorted(members.items())
    ]


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [v for v in values if isinstance(v, int | float)]
    return round(sum(numbers) / len(numbers), 4) if numbers else None


def chosen_responses(run: RunFolder, tokens: int) -> list[dict[str, Any]]:
    """Recorded responses, evenly over the run, of at most so many tokens together. Each has its own texts of tokens."""
    known = [(step, texts, r) for step, texts, r in run.responses() if isinstance(r.get("ids"), list) and r["ids"]]
    total = sum(min(len(r["ids"]), LONGEST) for _, _, r in known)
    every = max(1, -(-total // tokens)) if tokens else len(known) + 1
    return [_cut(step, texts, r) for i, (step, texts, r) in enumerate(known) if i % every == 0]


def _cut(step: int, texts: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    cut = {"step": step} | response | {"shown": min(len(response["ids"]), LONGEST)}
    for key in ("ids", "logprobs", "teacher_logprobs", "overlap", "weight"):
        if isinstance(cut.get(key), list):
            cut[key] = [_two(v) if key != "ids" else v for v in cut[key][:LONGEST]]
    for key in ("candidates", "candidate_logprobs", "candidate_teacher"):
        if isinstance(cut.get(key), list):
            cut[key] = [[_two(v) if key != "candidates" else v for v in row] for row in cut[key][:LONGEST]]
    ids = {t for t in (*cut["ids"], *(c for row in cut.get("candidates", ()) for c in row))}
    cut["tokens"] = {str(t): str(texts.get(str(t), f"<{t}>")) for t in sorted(ids)}
    return cut


def _two(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def settings(runs: list[RunFolder]) -> dict[str, Any]:
    """Keys with the same value in every run, and those that differ: value of each run."""
    flat = [flat_settings(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one})
    table = {key: [shown_setting(key, one.get(key, "")) for one in flat] for key in keys}
    raw = {key: {one.get(key, "") for one in flat} for key in keys}
    return {
        "same": {key: values[0] for key, values in table.items() if len(raw[key]) == 1},
        "differ": {key: values for key, values in table.items() if len(raw[key]) > 1 and key != "run_dir"},
    }
