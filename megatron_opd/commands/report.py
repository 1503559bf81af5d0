"""`megatron-opd report RUN [RUN ...]`: one HTML file that shows the runs; it opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.commands.terminal import visible
from megatron_opd.evaluation.verifiers import Case, VerifierError, VerifierPool, opened_thinking
from megatron_opd.plugins import VERIFIERS
from megatron_opd.records.run_folder import RunFolder
from megatron_opd.report.page import write_report


def report(folders: list[str], out: str | None = None, tokens: int | None = None, judge: bool = True) -> None:
    """Writes it and prints where it is. `judge`: the run's verifier says which recorded responses are right.

    Raises InputError where a folder has no run, or the file cannot be written."""
    runs = [RunFolder(Path(folder)) for folder in folders]
    _tell_apart(runs)
    path = Path(out) if out else runs[0].path / "report.html"
    more: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
    size = write_report(runs, path, judge=_judge if judge else None, **more)
    print(f"{path}: {size / 2**20:.1f} MiB; open it in a browser")


def _tell_apart(runs: list[RunFolder]) -> None:
    """Runs of the same name are called by their paths' last two parts, or by their numbers."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.path.resolve().parts[-2:])
    names = [run.name for run in runs]
    for number, run in enumerate(runs, 1):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({number})"


def _judge(run: RunFolder, responses: list[dict[str, Any]]) -> None:
    """Sets "correct" where there is a reference answer. Only verifiers of the package: a report runs nobody's code."""
    data = run.config.get("data")
    name = data.get("verifier", "math") if isinstance(data, dict) else "math"
    judged = [r for r in responses if r.get("answer") and r.get("reward") is None]
    if not judged:
        return
    if name not in VERIFIERS:
        print(f"{run.name}: responses are not judged: data.verifier: {visible(name)} is the run's own")
        return
    cases = [_case(r) for r in judged]
    with VerifierPool(name, 10.0, 2) as pool:
        try:
            verdicts = pool.score(cases)
        except VerifierError as error:  # math-verify or reasoning-gym cannot be imported here
            print(f"{run.name}: responses are not judged: {error}")
            return
    for response, verdict in zip(judged, verdicts, strict=True):
        response["correct"] = None if verdict.problem else bool(verdict.correct)


def _case(response: dict[str, Any]) -> Case:
    text = "".join(str(response["tokens"].get(str(token), "")) for token in response["ids"])
    prompt, metadata = str(response.get("prompt", "")), response.get("metadata")
    source = str(response.get("source", ""))
    return Case(
        text, str(response["answer"]), metadata if isinstance(metadata, dict) else {}, source, opened_thinking(prompt)
    )
