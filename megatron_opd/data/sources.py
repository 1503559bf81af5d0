"""Rows of JSONL and Parquet files and of a user's own function, and the columns that public data sets use."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
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
# Data sets of reasoning-gym whose entries hold no reference answer.
UNANSWERED_GYM_SETS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}

_MISSING = object()


class DataError(InputError):
    """A prompts file cannot be used; the message names the file, the line or row, the key and the problem."""


@dataclass(frozen=True)
class Row:
    """One object of a prompts file; `uid` is its position in the file, counted from 0."""

    uid: int
    where: str  # "FILE: line 3" or "FILE: row 3", counted from 1
    values: dict[str, Any]


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
            where = f"{name}: item {count + 1}"
            if not isinstance(values, Mapping):
                raise DataError(f"{where}: must be an object with the prompt's columns, found {_type(values)}")
            yield Row(count, where, check_text(dict(values), where))
            count += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data source {name} failed after {count} rows: {type(error).__name__}: {error}") from error


class RowReader:
    """Prompt, answer and source of a file's rows. Its columns are settled on the way: the configured one, else that of
    the public data sets which the first row that has any of them has.

    An answer is missing where its column is, and where that holds null, NaN, "" or lists of nothing. What is there must
    be text or a number.
    """

    def __init__(
        self, prompt: str, answer: str, source: str, need_answer: bool | None = False, verifier: str = ""
    ) -> None:
        """
        need_answer: True: a row without an answer is refused. False: all rows have one or none has, else the first row
        without one is refused. None: answers do not matter, missing ones are counted.
        verifier: that judges the responses; "" where it is not known.
        """
        self.prompt_key, self.answer_key, self.source_key = prompt, answer, source
        self.need_answer, self.verifier = need_answer, verifier
        self.rows = self.answered = self.unanswered = 0
        self._first_unanswered: DataError | None = None
        self._notes: list[str] = []
        self._columns: dict[str, str] = {}

    def prompt(self, row: Row) -> str | list[dict[str, str]]:
        """The row's prompt: text, or checked chat messages that end with the user's. Raises DataError."""
        self.rows += 1
        key = self._column("prompt", row, self.prompt_key, PROMPT_COLUMNS)
        if key is None:
            raise missing_key(row, self.prompt_key)
        return prompt_of(row, key)

    def answer(self, row: Row) -> str | None:
        """The row's reference answer as text, None where it has none. Raises DataError, also for an earlier row."""
        key = self._column("answer", row, self.answer_key, ANSWER_COLUMNS) or self.answer_key
        if not is_missing(lookup(row.values, key)):
            answer = answer_of(row, key)
            self.answered += 1
            self._refuse_mixture()
            return answer
        if not self._judged_by_its_entry(row):
            self._first_unanswered = self._first_unanswered or missing_key(row, key)
            if self.need_answer:
                raise self._first_unanswered
            self.unanswered += 1
            self._refuse_mixture()
        return None

    def _refuse_mixture(self) -> None:
        if self.need_answer is False and self.answered and self._first_unanswered:
            raise DataError(f"{self._first_unanswered}; other rows have one: give each an answer, or none")

    def source(self, row: Row) -> str:
        """The name of the data set that the row comes from, "" where it has none."""
        key = self._column("source", row, self.source_key, SOURCE_COLUMNS)
        value = lookup(row.values, key) if key else None
        return "" if is_missing(value) else str(value)

    def column(self, role: str) -> str:
        """The column of the "prompt", "answer" or "source"."""
        return self._columns.get(role, getattr(self, f"{role}_key"))

    @property
    def notes(self) -> list[str]:
        """What was chosen for the user and what the file lacks, in words, once its rows have been read."""
        notes = list(self._notes)
        if self.unanswered and not self.answered:
            notes.append(f"answer_key: {self.answer_key} is not in the file or empty, its prompts have no answers")
        elif self.unanswered:
            count = self.unanswered + self.answered
            notes.append(f"{self.unanswered} of {count} rows have no answer; the first, {self._first_unanswered}")
        return notes

    def _column(self, role: str, row: Row, configured: str, known: tuple[str, ...]) -> str | None:
        if role not in self._columns:
            for key in (configured, *known):
                value = lookup(row.values, key)
                if value is not None if role == "prompt" else not is_missing(value):  # a blank prompt is an error
                    self._columns[role] = key
                    if key != configured:
                        self._notes.append(f"{role}_key: {configured} is not in the file, took {key}")
                    break
        return self._columns.get(role)

    def _judged_by_its_entry(self, row: Row) -> bool:
        """Some of reasoning-gym's problems have no reference answer: their scorers judge by the entry."""
        if self.verifier not in ("", "reasoning_gym"):
            return False
        entry = row.values.get("metadata")
        with contextlib.suppress(ValueError):
            entry = json.loads(entry) if isinstance(entry, str) else entry
        entry = entry if isinstance(entry, dict) else {}
        inner = entry["metadata"] if isinstance(entry.get("metadata"), dict) else entry
        name = str(inner.get("source_dataset") or self.source(row).removeprefix("reasoning_gym:"))
        return name in UNANSWERED_GYM_SETS


def lookup(values: dict[str, Any], key: str) -> Any:
    """The value under a key; dots reach into objects where no key has that very name. None where there is none."""
    if key in values:
        return values[key]
    value: Any = values
    for part in key.split("."):
        value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
    return None if value is _MISSING else value


def plain(value: Any) -> Any:
    """numpy's scalars and arrays as Python's own, decimals as numbers."""
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if isinstance(value, Decimal):
        return float(value) if value.is_nan() else int(value) if value == value.to_integral_value() else str(value)
    return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, NaN, blank text, lists of nothing."""
    value = plain(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas'
        return True
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, tuple)) and all(is_missing(x) for x in value)


def missing_key(row: Row, key: str) -> DataError:
    """The error for a row that lacks a key or has nothing there, with the keys that it has."""
    keys, value = _paths(row.values), plain(lookup(row.values, key))
    if key not in keys:
        return DataError(f"{row.where}: key {key!r} is missing; its keys are {', '.join(keys) or 'none'}")
    if isinstance(value, str):
        return DataError(f"{row.where}: key {key!r} is empty")
    if isinstance(value, (list, tuple)):
        return DataError(f"{row.where}: key {key!r} is a list of nothing")
    return DataError(f"{row.where}: key {key!r} is {'NaN' if isinstance(value, float) else 'null'}")


def prompt_of(row: Row, key: str) -> str | list[dict[str, str]]:
    """The row's prompt: text, or checked chat messages that end with the user's. Raises DataError."""
    value = plain(lookup(row.values, key))
    if value is None or (isinstance(value, (float, str)) and is_missing(value)):
        raise missing_key(row, key)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{row.where}: key {key!r} must be text or chat messages, found {_type(value)}")
    if not value:
        raise DataError(f"{row.where}: key {key!r} has no messages")
    for i, message in enumerate(value):
        good = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not good:
            raise DataError(
                f"{row.where}: key {key!r}, message {i + 1} must be an object with the texts role and content, "
                f"found {str(message)[:80]}"
            )
    if value[-1]["role"] != "user":
        raise DataError(f"{row.where}: key {key!r} must end with the user's message, not one of {value[-1]['role']!r}")
    if not value[-1]["content"].strip():
        raise DataError(f"{row.where}: key {key!r}, the last message is empty")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def answer_of(row: Row, key: str) -> str:
    """The row's reference answer as text; whole numbers stored as floats lose their ".0". Raises DataError."""
    value = plain(lookup(row.values, key))
    if is_missing(value):
        raise missing_key(row, key)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{row.where}: key {key!r} must be text or a number, found {_type(value)}")
    return str(value)


def metadata_of(row: Row) -> dict[str, Any]:
    """The row's `metadata`, for verifiers. What is not an object (some public files) is kept under that name."""
    value = row.values.get("metadata")
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"metadata": value}


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """One line of a JSONL file. Raises DataError."""
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must hold one JSON object a line, found {_type(values)}")
    return check_text(values, where) if b"\\u" in line else values


def check_text(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Raises DataError where a text holds half a character, which no tokenizer takes; returns the values."""
    for key, text in _texts(values):
        half = broken_character(text)
        if half:
            raise DataError(f"{where}: key {key!r} holds {half}, half a character; its text was cut there")
    return values


def broken_character(text: str) -> str:
    """The first lone surrogate of a text as it is written in JSON, "" where there is none."""
    match = re.search("[\ud800-\udfff]", text)
    return f"\\u{ord(match.group()):04x}" if match else ""


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value, keys included, with the path to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            yield from _texts(key, where)
            yield from _texts(inner, where)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for uid, line in enumerate(file):
            if line.strip():
                where = f"{path}: line {uid + 1}"
                yield Row(uid, where, parse_json_line(line, where))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    uid = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in _values(batch):
                    yield Row(uid, f"{path}: row {uid + 1}", values)
                    uid += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {uid + 1}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file, at row {uid + 1}: {error}") from error


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow batch; one by one where a text is broken, so that the good ones before it come first."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            yield from batch.slice(i, 1).to_pylist()


def _paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in values.items():
        paths += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + str(key)]
    return paths


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
