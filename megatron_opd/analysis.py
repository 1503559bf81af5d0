"""Runs as pandas frames, for notebooks: `pip install 'megatron_opd[analysis]'`.

    from megatron_opd import analysis
    metrics = analysis.metrics("runs/paper", "runs/off")
    metrics.pivot(columns="run", values="overlap_mean").plot()

Each function takes run directories, of runs under way or cut short, too, and puts their name into the column `run`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

try:
    import pandas
except ImportError as error:
    raise ImportError("megatron_opd.analysis needs pandas: pip install 'megatron_opd[analysis]'") from error

from megatron_opd.records.run_folder import RunFolder, flat_settings

Runs = str | os.PathLike[str]


def metrics(*runs: Runs) -> pandas.DataFrame:
    """metrics.jsonl: one row a step, indexed by `step`, inner objects as NAME/INNER (`accuracy/aime`), and sums so far:
    `tokens_so_far`, `seconds_so_far`. Raises InputError where a folder has no run, as all of these do."""
    frames = []
    for run in _folders(runs):
        frame = pandas.json_normalize(run.steps, sep="/")
        if frame.empty:
            continue
        frame.insert(0, "run", run.name)
        for name, key in (("tokens_so_far", "tokens_generated"), ("seconds_so_far", "step_s")):
            if key in frame:
                frame[name] = frame[key].fillna(0).cumsum()
        frames.append(frame.set_index("step"))
    return pandas.concat(frames) if frames else pandas.DataFrame(columns=["run"]).rename_axis("step")


def settings(*runs: Runs) -> pandas.DataFrame:
    """config.yaml: a row for each key with dots, a column for each run, values as text."""
    return pandas.DataFrame(
        {run.name: pandas.Series(flat_settings(run.config), dtype=object) for run in _folders(runs)}
    )


def responses(*runs: Runs) -> pandas.DataFrame:
    """Recorded responses: a row each, with `prompt`, `text`, `answer`, `end_reason`, `length`, `effective_length`,
    `events`, `overlap` (its mean), `reward` and where it comes from."""
    rows = []
    for run in _folders(runs):
        for number, (step, texts, r) in enumerate(run.responses()):
            known = [v for v in r.get("overlap") or () if v is not None]
            rows.append(
                {"run": run.name, "step": step, "response": number}
                | {key: r.get(key) for key in ("source", "teacher", "uid", "index", "prompt")}
                | {"text": "".join(str(texts.get(str(t), f"<{t}>")) for t in r.get("ids") or ())}
                | {
                    key: r.get(key)
                    for key in ("answer", "end_reason", "length", "effective_length", "events", "reward")
                }
                | {"overlap": sum(known) / len(known) if known else None}
            )
    return pandas.DataFrame(rows)


def tokens(*runs: Runs) -> pandas.DataFrame:
    """Recorded responses token by token: `response` (as in `responses`), `position`, `token`, `overlap`, `weight`,
    `logprob` and `teacher_logprob` (nats), `drift` (whether it is an event). None where the teacher has not read."""
    parts = []
    for run in _folders(runs):
        for number, (step, texts, r) in enumerate(run.responses()):
            ids, drift = list(r.get("ids") or ()), set(r.get("drift") or ())
            columns: dict[str, Any] = {
                "run": run.name,
                "step": step,
                "response": number,
                "position": range(len(ids)),
                "token": [str(texts.get(str(t), f"<{t}>")) for t in ids],
                "drift": [i in drift for i in range(len(ids))],
            }
            for name, key in _OF_TOKENS.items():
                values = list(r.get(key) or ())[: len(ids)]
                columns[name] = values + [None] * (len(ids) - len(values))
            parts.append(pandas.DataFrame(columns))
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame()


_OF_TOKENS = {
    "overlap": "overlap",
    "weight": "weight",
    "logprob": "logprobs",
    "teacher_logprob": "teacher_logprobs",
}


def drift(*runs: Runs) -> pandas.DataFrame:
    """positions.jsonl: a row for each step and bin of positions, which begins at token `position`: `tokens` that the
    teacher has read there, their mean `overlap`, drift `events`, and responses whose reliability was `spent` there."""
    rows = []
    for run in _folders(runs):
        for line in run.positions:
            for b, count in enumerate(line["tokens"]):
                row = {"run": run.name, "step": line["step"], "position": b * line["width"], "tokens": count}
                rows.append(row | {key: line[key][b] for key in ("overlap", "events", "spent")})
    return pandas.DataFrame(rows)


def evaluations(*runs: Runs) -> pandas.DataFrame:
    """Saved responses of evaluations, a row each: `set`, `step`, and what the file has of it (`response`, `correct`,
    ...)."""
    rows = []
    for run in _folders(runs):
        for path in sorted((run.path / "eval").glob("*-step*.jsonl")):
            name, _, step = path.stem.rpartition("-step")
            if step.isdigit():
                for line in path.read_bytes().splitlines():
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue  # torn by a crash
                    rows.append({"run": run.name, "set": name, "step": int(step)} | record)
    return pandas.DataFrame(rows)


def _folders(runs: tuple[Runs, ...]) -> list[RunFolder]:
    folders = [RunFolder(Path(run)) for run in runs]
    names = [folder.name for folder in folders]
    for folder in folders:
        if names.count(folder.name) > 1:
            folder.name = "/".join(folder.path.resolve().parts[-2:])
    return folders
