"""Turns public data files into our JSONL and checks prompts files; `tools/prepare_data.py` is its command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.data.sources import DataError, Row, RowReader, metadata_of, parse_json_line, read_rows
from megatron_opd.files import new_file


@dataclass
class Report:
    """What `validate` found. `problems` make the file unusable, `warnings` do not."""

    rows: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    source_key: str = "source",
    name: str = "",
    drop_duplicates: bool = False,
    overwrite: bool = False,
    need_answer: bool | None = True,
) -> tuple[int, int, tuple[str, ...]]:
    """Writes the rows of a Parquet or JSONL file as {"prompt", "answer", "source"[, "metadata"]} lines.

    `name` is the source of rows that have none. Rows without an answer are refused, or, where none is needed, written
    without one. The file appears whole or not at all.

    Returns the rows written, the duplicates among the rows read, and notes on the columns taken. Raises DataError.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; remove it or pass --overwrite")
    partial = out.with_name(f".{out.name}.partial")
    reader = RowReader(prompt_key, answer_key, source_key, need_answer)
    seen: set[str] = set()
    written = duplicates = 0
    try:
        with new_file(partial).open("x", encoding="utf-8") as file:
            for row in read_rows(source):
                values = _our_values(row, reader, name)
                key = json.dumps(values["prompt"])
                duplicates += key in seen
                if key in seen and drop_duplicates:
                    continue
                seen.add(key)
                file.write(_line(row, values))
                written += 1
        if not reader.rows:
            raise DataError(f"{source}: the file is empty")
        os.replace(partial, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return written, duplicates, tuple(reader.notes)


def _our_values(row: Row, reader: RowReader, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"prompt": reader.prompt(row)}
    answer = reader.answer(row)
    if answer is not None:
        values["answer"] = answer
    values["source"] = reader.source(row) or name
    metadata = metadata_of(row)
    return {**values, "metadata": metadata} if metadata else values


def _line(row: Row, values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:  # a Parquet file may hold dates, bytes, ...
        raise DataError(f"{row.where}: its metadata cannot be written as JSON: {error}") from error


def validate(
    path: str | Path, prompt_key: str = "prompt", answer_key: str = "answer", need_answers: bool | None = True
) -> Report:
    """Checks every line of a prompts file; each finding names the line, the key and the problem."""
    report = Report()
    reader = RowReader(prompt_key, answer_key, "source", need_answers)
    first: dict[str, tuple[Row, str | None]] = {}
    for row in _rows_with_problems(path, report):
        report.rows += 1
        try:
            prompt = json.dumps(reader.prompt(row))
            answer = reader.answer(row)
        except DataError as error:
            report.problems.append(str(error))
            continue
        earlier, expected = first.setdefault(prompt, (row, answer))
        if earlier is not row:
            where = earlier.where.removeprefix(f"{path}: ")
            if answer != expected:
                key = reader.column("answer")
                report.problems.append(
                    f"{row.where}: key {key!r} is {answer!r}, for the same prompt in {where} {expected!r}"
                )
            else:
                report.warnings.append(f"{row.where}: key {reader.column('prompt')!r} repeats {where}")
    report.warnings[:0] = reader.notes
    if report.rows == 0 and not report.problems:
        report.problems.append(f"{path}: the file is empty")
    return report


def _rows_with_problems(path: str | Path, report: Report) -> Iterator[Row]:
    """As `read_rows`, but broken lines of a JSONL file become problems and reading goes on."""
    path = Path(path)
    if path.suffix == ".parquet" or not path.is_file():
        try:
            yield from read_rows(path)
        except DataError as error:
            report.problems.append(str(error))
        return
    with path.open("rb") as file:
        for uid, line in enumerate(file):
            if not line.strip():
                continue
            where = f"{path}: line {uid + 1}"
            try:
                yield Row(uid, where, parse_json_line(line, where))
            except DataError as error:
                report.problems.append(str(error))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 fine, 1 a problem in the data (2, from argparse, a wrong call)."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument("--prompt-key", default="prompt", help="column of the prompt (default: prompt)")
    keys.add_argument("--answer-key", default="answer", help="column of the answer; dots reach into objects")
    to_jsonl = commands.add_parser("convert", parents=[keys], help="write a Parquet or JSONL file as our JSONL")
    to_jsonl.add_argument("file")
    to_jsonl.add_argument("--out", required=True, help="JSONL file to write")
    to_jsonl.add_argument("--source-key", default="source", help="column that names the data set")
    to_jsonl.add_argument("--name", default="", help="data set name of rows that have none")
    to_jsonl.add_argument("--drop-duplicates", action="store_true", help="keep a prompt's first row alone")
    to_jsonl.add_argument("--no-answers", action="store_true", help="keep rows that have no answer")
    to_jsonl.add_argument("--overwrite", action="store_true", help="replace an existing file")
    check = commands.add_parser("validate", parents=[keys], help="name every line, key and problem of a prompts file")
    check.add_argument("file")
    check.add_argument("--no-answers", action="store_true", help="the file may lack answers")
    check.add_argument("--show", type=int, default=20, help="findings of each kind to print (default: 20)")
    options = parser.parse_args(arguments)
    try:
        return _convert_command(options) if options.command == "convert" else _validate_command(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _convert_command(options: argparse.Namespace) -> int:
    written, duplicates, notes = convert(
        options.file,
        options.out,
        options.prompt_key,
        options.answer_key,
        options.source_key,
        options.name,
        options.drop_duplicates,
        options.overwrite,
        None if options.no_answers else True,
    )
    for note in notes:
        print(note)
    kept = "dropped" if options.drop_duplicates else "kept"
    print(f"wrote {written} prompts to {options.out} ({duplicates} duplicates {kept})")
    return 0


def _validate_command(options: argparse.Namespace) -> int:
    report = validate(options.file, options.prompt_key, options.answer_key, None if options.no_answers else True)
    for kind, findings, stream in (
        ("warning", report.warnings, sys.stdout),
        ("problem", report.problems, sys.stderr),
    ):
        for finding in findings[: options.show]:
            print(f"{kind}: {finding}", file=stream)
        if len(findings) > options.show:
            print(f"... and {len(findings) - options.show} more", file=stream)
    print(f"{report.rows} rows, {len(report.problems)} problems, {len(report.warnings)} warnings")
    return 1 if report.problems else 0
