"""Rows of JSONL and Parquet files and of a user's own function, and the columns that public data sets use."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import ConfigError, InputError
from megatron_opd.plugins import load_part

# Where the prompt, the answer and the data set's name stand when the configured column is not in the file. The first
# that the file's first row has is taken.
#   DAPO-Math-17K (and other verl files): prompt = [{role, content}], reward_model.ground_truth, data_source
#   AIME: Problem/Answer or problem/answer; HMMT: problem/answer; AMC: question/answer
PROMPT_COLUMNS = ("prompt", "problem", "Problem", "question", "Question")
ANSWER_COLUMNS = ("answer", "Answer", "reward_model.ground_truth", "expected_answer", "final_answer")
SOURCE_COLUMNS = ("source", "data_source")

_MISSING = object()


class DataError(InputError):
    """A prompts file cannot be used; the message names the file, the line or row, the key and the problem."""


@dataclass(frozen=True)
class Row:
    """One object of a prompts file; `uid` is its place in the file, counted from 0."""

    uid: int
    place: str  # "FILE: line 3" or "FILE: row 3", counted from 1
    values: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are used; `notes` says where they are not the configured ones."""

    prompt: str
    answer: str | None
    source: str | None
    notes: tuple[str, ...] = ()


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a `.parquet` or JSONL file, in order. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def rows_of_function(name: str, size: int, seed: int) -> Iterator[Row]:
    """The first `size` rows that the user's MODULE:FUNCTION returns for (size, seed).

    Raises:
        DataError: the module or the function is not there, it fails, or a row is no object.
    """
    try:
        own = load_part("prompts", name, {})
    except ConfigError as error:
        raise DataError(str(error)) from error
    count = 0
    try:
        for values in itertools.islice(own(size, seed), size):
            place = f"{name}: item {count + 1}"
            if not isinstance(values, Mapping):
                raise DataError(f"{place}: must be an object with the prompt's columns, found {_type(values)}")
            yield Row(count, place, dict(values))
            count += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data source {name} failed after {count} rows: {type(error).__name__}: {error}") from error


def find_columns(row: Row, prompt: str, answer: str, source: str, need_answer: bool = False) -> Columns:
    """Settles a file's columns by its first row: the configured ones, else those of the public data sets.

    Raises:
        DataError: no prompt column, or none with answers where they are needed; lists the row's keys.
    """
    notes: list[str] = []

    def settle(role: str, key: str, known: tuple[str, ...]) -> str | None:
        if lookup(row.values, key) is not None:
            return key
        for other in known:
            if lookup(row.values, other) is not None:
                notes.append(f"{role}_key: {key} is not in the file, took {other}")
                return other
        return None

    prompt_column = settle("prompt", prompt, PROMPT_COLUMNS)
    if prompt_column is None:
        raise missing_key(row, prompt)
    answer_column = settle("answer", answer, ANSWER_COLUMNS)
    if answer_column is None:
        if need_answer:
            raise missing_key(row, answer)
        notes.append(f"answer_key: {answer} is not in the file, its prompts have no answers")
    return Columns(prompt_column, answer_column, settle("source", source, SOURCE_COLUMNS), tuple(notes))


def lookup(values: dict[str, Any], key: str) -> Any:
    """The value under a key; dots reach into objects where no key has that very name. None where there is none."""
    if key in values:
        return values[key]
    value: Any = values
    for part in key.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    return None if value is _MISSING else value


def missing_key(row: Row, key: str) -> DataError:
    """The error for a row that lacks a key or has null there, with the keys that it has."""
    keys = _paths(row.values)
    if key in keys:
        return DataError(f"{row.place}: key {key!r} is null")
    return DataError(f"{row.place}: key {key!r} is missing; its keys are {', '.join(keys) or 'none'}")


def prompt_of(row: Row, key: str) -> str | list[dict[str, str]]:
    """The row's prompt: text, or checked chat messages that end with the user's. Raises DataError."""
    value = lookup(row.values, key)
    if value is None:
        raise missing_key(row, key)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{row.place}: key {key!r} is empty")
        return value
    if not isinstance(value, list):
        raise DataError(f"{row.place}: key {key!r} must be text or chat messages, found {_type(value)}")
    if not value:
        raise DataError(f"{row.place}: key {key!r} has no messages")
    for i, message in enumerate(value):
        good = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not good:
            raise DataError(
                f"{row.place}: key {key!r}, message {i + 1} must be an object with the texts role and content, "
                f"found {str(message)[:80]}"
            )
    if value[-1]["role"] != "user":
        raise DataError(f"{row.place}: key {key!r} must end with the user's message, not one of {value[-1]['role']!r}")
    if not value[-1]["content"].strip():
        raise DataError(f"{row.place}: key {key!r}, the last message is empty")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def answer_of(row: Row, key: str) -> str:
    """The row's reference answer as text; whole numbers stored as floats lose their ".0". Raises DataError."""
    value = lookup(row.values, key)
    if value is None:
        raise missing_key(row, key)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{row.place}: key {key!r} must be text or a number, found {_type(value)}")
    if not str(value).strip():
        raise DataError(f"{row.place}: key {key!r} is empty")
    return str(value)


def source_of(row: Row, key: str | None) -> str:
    """The name of the data set that the row comes from, "" where it has none."""
    value = lookup(row.values, key) if key else None
    return "" if value is None else str(value)


def metadata_of(row: Row) -> dict[str, Any]:
    """The row's `metadata`, for verifiers. What is not an object (some public files) is kept under that name."""
    value = row.values.get("metadata")
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"metadata": value}


def parse_json_line(line: bytes, place: str) -> dict[str, Any]:
    """One line of a JSONL file. Raises DataError."""
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise DataError(f"{place}: broken JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{place}: must hold one JSON object a line, found {_type(values)}")
    return values


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for uid, line in enumerate(file):
            if line.strip():
                place = f"{path}: line {uid + 1}"
                yield Row(uid, place, parse_json_line(line, place))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    uid = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(uid, f"{path}: row {uid + 1}", values)
                    uid += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file, at row {uid + 1}: {error}") from error


def _paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + str(key)]
    return found


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
