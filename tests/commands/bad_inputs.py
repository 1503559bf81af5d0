"""Generated bad inputs for every command: configs, overrides, prompts, tokenizers, models, checkpoints, gates.

    python -m tests.commands.bad_inputs 25            25 inputs of each kind; a JSON report on stdout
    python -m tests.commands.bad_inputs 2000 --seed 7 --kinds configs checkpoints

An input is wrong in ways that Hypothesis chooses, and sometimes harmless.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron_opd.config.keys import keys
from tests.commands.lab import Failures, Lab

PER_PROCESS = 250  # inputs: each run leaves some open files of gloo's behind
PATHS = [key.path for key in keys()]
WORDS = (
    *"on off null ~ 010 1:30 1e-6 2026-01-01 @x [x { % &a *a # !!python/name:os.system .nan -.inf 1e999 0x a:b".split(),
    *"json:loads no_module:x é ../.. / ~/x $HOME -1 reasoning_gym:nothing reasoning_gym:".split(),
    *("", "a: b", "a # b", "\0", "\ud83d", "9" * 40),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(WORDS),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


# What is done to values and bytes


def broken_json(data: st.DataObject, value: Any) -> Any:
    """The document with one or two of its values replaced, removed or put under other names."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 2))):
        node, parent, key = value, None, None
        while isinstance(node, dict | list) and len(node) and (parent is None or data.draw(st.booleans())):
            names = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, data.draw(st.sampled_from(names[:60]))
            node = node[key]
        if parent is None:
            return data.draw(junk)
        if data.draw(st.booleans()):
            parent[key] = data.draw(junk)
        else:
            del parent[key]
    return value


def broken_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """Cut off, with other bytes somewhere, or something else altogether."""
    how = data.draw(st.sampled_from(["cut", "change", "insert", "other", "twice"]))
    at = data.draw(st.integers(0, max(0, min(len(whole) - 1, 4000)))) if data.draw(st.booleans()) else len(whole) // 2
    if how == "cut":
        return whole[:at]
    if how == "change":
        new = data.draw(st.binary(min_size=1, max_size=8))
        return whole[:at] + new + whole[at + len(new) :]
    if how == "insert":
        return whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at:]
    return data.draw(st.binary(max_size=40)) if how == "other" else whole + whole


def broken_file(data: st.DataObject, path: Path) -> str:
    """Breaks one file in place; says how."""
    how = data.draw(st.sampled_from(["bytes", "json", "gone", "folder", "json"]))
    if how == "json" and path.suffix == ".json":
        path.write_text(json.dumps(broken_json(data, json.loads(path.read_text()))))
    elif how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(broken_bytes(data, path.read_bytes()))
    return f"{path.name}: {how}"


def broken_files(data: st.DataObject, folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    chosen = data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True))
    return "; ".join(broken_file(data, path) for path in chosen)


def seal(step: Path) -> str:
    """Makes the sizes that a checkpoint's manifest states those of its files, so that what is broken is read."""
    try:
        manifest = json.loads((step / "megatron_opd.json").read_text())
        sizes = manifest["checkpoint"]["files"]
        sizes.update({name: (step / name).stat().st_size for name in sizes if (step / name).is_file()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    (step / "megatron_opd.json").write_text(json.dumps(manifest))
    return "; sealed"


def set_key(values: dict[str, Any], path: str, value: Any) -> None:
    *outer, name = path.split(".")
    for part in outer:
        inner = values.get(part)
        if isinstance(inner, list):
            inner = inner[0] if inner and isinstance(inner[0], dict) else {}
        if not isinstance(inner, dict):
            inner = values[part] = {}
        values = inner
    values[name] = value


# The kinds


def configs(lab: Lab, data: st.DataObject) -> None:
    """A file and overrides; models are not there, so that nothing is loaded where they are right."""
    values = json.loads(json.dumps(lab.values))
    values["student"]["model"] = values["teacher"]["model"] = "nowhere"
    for _ in range(data.draw(st.integers(0, 3))):
        set_key(values, data.draw(st.sampled_from(PATHS)), data.draw(junk))
    try:
        text = yaml.dump(values, allow_unicode=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        text = json.dumps(values).encode()
    if data.draw(st.integers(0, 3)) == 0:
        text = broken_bytes(data, text)
    if data.draw(st.integers(0, 3)) == 0:
        lines = text.split(b"\n")
        lines.insert(data.draw(st.integers(0, len(lines))), data.draw(st.sampled_from(lines)))
        text = b"\n".join(lines)
    path = lab.fresh("c.yaml")
    path.write_bytes(text)
    overrides = []
    for _ in range(data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from(PATHS) | st.text(max_size=8).filter(lambda t: not t.startswith("-")))
        value = data.draw(st.sampled_from(WORDS) | st.text(max_size=12) | junk.map(repr))
        overrides.append(f"{key}={value}")
    command = data.draw(st.sampled_from(["train", "eval", "doctor", "compare", "train"]))
    variants = (
        ["--variant", data.draw(st.sampled_from(["a", "../b", "a=b", ""])), *overrides] if command == "compare" else []
    )
    if command == "doctor":
        command = "eval"  # it goes on after what is wrong, which takes its time; of configs both ask the same
    lab.call(
        "configs", command, [str(path), *([] if variants else overrides), *variants], text.decode(errors="replace")
    )


def settings_of_runs(lab: Lab, data: st.DataObject) -> None:
    """Values that fit their keys' types, on real models: what only contradicts the models or another key."""
    overrides = [f"run_dir={lab.fresh('run')}"]
    chosen = [
        k
        for k in keys()
        if not k.shape.section
        and not k.path.startswith(
            ("run_dir", "device", "rollout.vllm", "student.model", "teacher.model", "student.family", "teacher.family")
        )
    ]
    for key in data.draw(st.lists(st.sampled_from(chosen), min_size=1, max_size=4, unique=True)):
        if key.path in (
            "train.steps",
            "train.prompts_per_step",
            "train.responses_per_prompt",
            "rollout.engine",
            "prune.budget.maximum",
        ):
            continue
        base = key.shape.base
        if isinstance(base, tuple):
            value = data.draw(st.sampled_from(base))
        elif base is bool:
            value = data.draw(st.sampled_from(["true", "false"]))
        elif base is int:
            value = data.draw(st.sampled_from([0, 1, 2, 3, 4, 7, 64, 300, 2**31 - 1, 2**63 - 1]))
        elif base is float:
            value = data.draw(st.sampled_from([0, 1e-30, 0.1, 0.5, 1.0, 2.0, 1e8, 1e30, 1e308]))
        else:
            value = data.draw(
                st.sampled_from(["null", "a", "json:loads", "prompt", "{}", "[]", "none", "grpo", "reasoning_gym", ""])
            )
        path = key.path.replace("eval.sets.", "eval.sets.0.")
        overrides.append(f"{path}={value}")
    command = data.draw(st.sampled_from(["train", "train", "eval"]))
    lab.call("settings", command, [str(lab.tiny.config), *overrides])


def prompts(lab: Lab, data: st.DataObject) -> None:
    good = [json.loads(line) for line in (lab.folder / "prompts.jsonl").read_text().splitlines()[:4]]
    messages = [{"prompt": [{"role": "user", "content": "a"}], "answer": "1", "reward_model": {"ground_truth": 3}}]
    rows = data.draw(st.sampled_from([good, messages, []]))
    rows = [
        *rows,
        *data.draw(
            st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "source", "problem"]), junk), max_size=2)
        ),
    ]
    if data.draw(st.booleans()):
        rows = broken_json(data, rows)
    form = data.draw(st.sampled_from(["jsonl", "jsonl", "parquet", "bytes"]))
    path = lab.fresh("p.parquet" if form == "parquet" else "p.jsonl")
    lines = rows if isinstance(rows, list) else [rows]
    text = "\n".join(json.dumps(row) for row in lines).encode()
    if form == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist([r for r in lines if isinstance(r, dict)]), path)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            path.write_bytes(text)
        if data.draw(st.booleans()):
            path.write_bytes(broken_bytes(data, path.read_bytes()))
    else:
        path.write_bytes(broken_bytes(data, text) if form == "bytes" else text)
    if data.draw(st.integers(0, 2)) == 0:
        lab.call("prompts", "prepare", ["validate", str(path), "--tokenizer", str(lab.folder / "student")], repr(rows))
        return
    more = data.draw(st.sampled_from([[], ["data.prompt_key=a.b"], ["data.verifier=math"], ["data.duplicates=drop"]]))
    arguments = [
        str(lab.tiny.config),
        f"data.prompts={path}",
        "eval.sets.0.prompts=nowhere.jsonl",
        f"run_dir={path.parent / 'run'}",
    ]
    lab.call("prompts", "train", [*arguments, *more], repr(rows))


def tokenizers(lab: Lab, data: st.DataObject) -> None:
    folder = lab.fresh("tokenizer")
    shutil.copytree(lab.folder / data.draw(st.sampled_from(["fast", "fast", "pieces"])), folder)
    how = broken_files(data, folder)
    arguments = [
        str(lab.tiny.config),
        f"data.tokenizer={folder}",
        "eval.sets.0.prompts=nowhere.jsonl",
        f"run_dir={folder.parent / 'run'}",
    ]
    form = data.draw(st.sampled_from([[], ["data.template=chat"], ["data.template=chat", "data.thinking=true"]]))
    lab.call("tokenizers", "train", [*arguments, *form], how)


def models(lab: Lab, data: st.DataObject) -> None:
    folder = lab.fresh("model")
    shutil.copytree(lab.folder / "student", folder)
    how = broken_files(data, folder)
    command, run = data.draw(st.sampled_from(["convert", "verify", "eval", "eval", "doctor"])), folder.parent / "run"
    if command == "convert":
        lab.call("models", "convert", ["import", "--hf", str(folder), "--out", str(folder.parent / "out")], how)
    elif command == "verify":
        whole = lab.folder / "first" / "checkpoints" / "step_000001"
        lab.call("models", "convert", ["verify", "--hf", str(folder), "--megatron", str(whole), "--length", "8"], how)
    elif command == "doctor":
        part = data.draw(st.sampled_from(["student", "teacher"]))
        lab.call("models", "doctor", [str(lab.tiny.config), f"{part}.model={folder}", f"run_dir={run}"], how)
    else:
        arguments = [str(lab.tiny.config), "--checkpoint", str(folder), f"run_dir={run}"]
        lab.call("models", "eval", [*arguments, f"data.tokenizer={lab.folder / 'student'}"], how)


def checkpoints(lab: Lab, data: st.DataObject) -> None:
    run = lab.fresh("run")
    shutil.copytree(lab.folder / "first", run)
    (step,) = (run / "checkpoints").glob("step_*")
    how = broken_files(data, data.draw(st.sampled_from([step, run])))
    if data.draw(st.booleans()):
        how += seal(step)
    command = data.draw(st.sampled_from(["train", "train", "eval", "export"]))
    if command == "train":
        steps = data.draw(st.sampled_from(["train.steps=1", "train.steps=2"]))
        lab.call("checkpoints", "train", [str(lab.tiny.config), f"run_dir={run}", steps], how)
    elif command == "export":
        lab.call("checkpoints", "convert", ["export", "--megatron", str(step), "--out", str(run / "out")], how)
    else:
        arguments = [str(lab.tiny.config), "--checkpoint", str(step), f"run_dir={run.parent / 'other'}"]
        lab.call("checkpoints", "eval", [*arguments, f"data.tokenizer={lab.folder / 'student'}"], how)


def gates(lab: Lab, data: st.DataObject) -> None:
    run = lab.fresh("run")
    run.mkdir()
    gate = {
        "steps": 1,
        "metrics": {"loss": {"maximum": 9.0}},
        "phases": {"train": {"minimum": 0}},
        "accuracy": {"a": {"minimum": 0}},
    }
    value = broken_json(data, gate) if data.draw(st.booleans()) else gate
    text = yaml.dump(value).encode("utf-8", "surrogatepass") if data.draw(st.booleans()) else json.dumps(value).encode()
    (run / "gate.yaml").write_bytes(broken_bytes(data, text) if data.draw(st.integers(0, 2)) == 0 else text)
    lines = (lab.folder / "first" / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(broken_json(data, json.loads(line))) if data.draw(st.booleans()) else line for line in lines]
    metrics = "\n".join(lines).encode()
    (run / "metrics.jsonl").write_bytes(broken_bytes(data, metrics) if data.draw(st.booleans()) else metrics)
    if data.draw(st.booleans()):
        lab.call("gates", "gate", [str(run), str(run / "gate.yaml")], metrics.decode(errors="replace"))
    else:
        lab.call("gates", "metrics", [str(run)], metrics.decode(errors="replace"))


def command_lines(lab: Lab, data: st.DataObject) -> None:
    """Options and files that are none."""
    lab.fresh("x")
    command = data.draw(st.sampled_from(["keys", "gate", "train", "doctor", "convert", "prepare", "metrics"]))
    first = {"convert": ["import", "export", "verify", "x"], "prepare": ["convert", "validate"]}.get(command, [])
    words = ["--hf", "--out", "--megatron", "--tp", "--dtype", "--length", "--tokenizer", "--nproc", "--variant", "--x"]
    names = [".", "student", "config.yaml", "prompts.jsonl", "first", "nowhere", "0", "-1", "a=b", "run_dir=", "="]
    word = st.sampled_from([*words, *names, *WORDS]) | st.text(max_size=8)
    given_words = data.draw(st.lists(word.filter(lambda w: w not in ("-h", "--help")), max_size=5))
    lab.call("command_lines", command, [*([data.draw(st.sampled_from(first))] if first else []), *given_words])


KINDS: dict[str, Callable[[Lab, st.DataObject], None]] = {
    "configs": configs,
    "settings": settings_of_runs,
    "prompts": prompts,
    "tokenizers": tokenizers,
    "models": models,
    "checkpoints": checkpoints,
    "gates": gates,
    "command_lines": command_lines,
}


def _of(kind: str, lab: Lab) -> Callable[[st.DataObject], None]:
    def one(data: st.DataObject) -> None:
        KINDS[kind](lab, data)

    return one


def explore(folder: Path, counts: dict[str, int], start: int | None) -> Failures:
    """So many inputs of each kind; the same ones each time where `start` is None."""
    lab = Lab(folder)
    for kind, count in counts.items():
        run = settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=start is None,
            suppress_health_check=list(HealthCheck),
        )(given(st.data())(_of(kind, lab)))
        if start is not None:
            run = seed(start)(run)
        run()
    return lab.failures


def in_processes(count: int, kinds: list[str], start: int) -> dict[str, Any]:
    """The reports of as many processes as it takes, each with other inputs, as one."""
    whole: dict[str, Any] = {"inputs": {}, "codes": {}, "failures": []}
    for kind in kinds:
        for number, done in enumerate(range(0, count, PER_PROCESS)):
            size = min(PER_PROCESS, count - done)
            command = [sys.executable, "-m", "tests.commands.bad_inputs", str(size), "--seed", str(start + number)]
            ended = subprocess.run([*command, "--kinds", kind], stdout=subprocess.PIPE, text=True)
            if not ended.stdout.strip():
                whole["failures"].append(f"{kind}: the process ended with {ended.returncode}, seed {start + number}")
                continue
            part = json.loads(ended.stdout)
            whole["inputs"][kind] = whole["inputs"].get(kind, 0) + part["inputs"].get(kind, 0)
            for code, times in part["codes"].get(kind, {}).items():
                codes = whole["codes"].setdefault(kind, {})
                codes[code] = codes.get(code, 0) + times
            whole["failures"] = sorted({*whole["failures"], *part["failures"]})
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, help="inputs of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, help="for other inputs than the same ones each time")
    options = parser.parse_args()
    if options.count > PER_PROCESS:
        report = in_processes(options.count, options.kinds, options.seed or 0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            counts = dict.fromkeys(options.kinds, options.count)
            report = explore(Path(folder).resolve(), counts, options.seed).report()
    print(json.dumps(report, indent=1))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
