"""Reads YAML and overrides into a `Config`, and writes one out; all problems are reported at once."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_opd.config.base import Section, absolute_path, warn_of_old_name, with_new_names
from megatron_opd.config.keys import all_keys, shape_of
from megatron_opd.config.reading import Reader, shape_at, write
from megatron_opd.config.root import Config
from megatron_opd.errors import ConfigError


def load_config(
    path: str | os.PathLike[str], overrides: list[str] | None = None, later: list[str] | None = None
) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and validates the whole; nothing else is loaded.

    Args:
        overrides: each key once. The value of a key that holds text is the text itself, all others are YAML.
        later: overrides that may change what the first ones have set.

    Raises:
        ConfigError: every problem at once, with key, value and remedy.
    """
    reader = Reader()
    text = read_text(path, "config")
    values = reader.file(text, str(path), Config)
    readable = values is not None
    values = _resolved(Config, values or {}, str(Path(path).resolve().parent), "", reader.problems)
    for layer in (overrides or [], later or []):
        _apply(reader, values, layer)
    problems = reader.problems
    if readable:
        try:
            config = Config.model_validate(values, context={"find_parts": True})
        except ValidationError as error:
            problems = problems + _described(error)
    if problems:
        raise ConfigError(_message(problems))
    return config


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A whole text file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read {what} {path}: it is not UTF-8 (byte {error.start}: {error.object[error.start]:#04x}); save "
            "it as UTF-8"
        ) from error
    except ValueError as error:  # a null byte in the path
        raise ConfigError(f"cannot read {what} {str(path)!r}: {error}") from error


def _apply(reader: Reader, values: dict[str, Any], overrides: list[str]) -> None:
    given: dict[tuple[str, ...], str] = {}
    for item in overrides:
        key, sign, value = item.partition("=")
        names = _new_path(key.strip())
        if not sign or not all(names):
            reader.problems.append(f"override {item!r} is not of the form key.path=value")
            continue
        for path, other in given.items():
            if path[: len(names)] == names and other != item:
                what = "is given twice" if path == names else "replaces what came before it"
                reader.problems.append(f"override {item!r}: {key.strip()} {what}, {other!r}; keep one")
        given[names] = item
        shape = shape_at(Config, list(names))
        before = len(reader.problems)
        new = reader.override(item, ".".join(names), value, shape)
        if len(reader.problems) == before:
            if shape.section:
                new = _resolved(shape.section, new, os.getcwd(), ".".join(names) + ".", reader.problems)
            _set(reader, values, item, list(names), new)


def _new_path(key: str) -> tuple[str, ...]:
    """The key's parts, old names replaced."""
    done: list[str] = []
    section: Any = Config
    for name in key.split("."):
        renamed = getattr(section, "renamed", {})
        if name in renamed:
            warn_of_old_name(key, ".".join([*done, renamed[name]]))
            done += renamed[name].split(".")
        else:
            done.append(name)
        section = shape_at(Config, done).section
    return tuple(done)


def _set(reader: Reader, values: dict[str, Any], item: str, path: list[str], value: Any) -> None:
    """Sets one key; a number in the path is an index into a list (eval.sets.0.limit)."""
    leaf: Any = values
    for depth, name in enumerate(path):
        where = ".".join(path[:depth])
        index: Any = name
        if isinstance(leaf, list):
            if not name.isdecimal() or int(name) >= len(leaf):
                reader.problems.append(f"override {item!r}: {where} is a list of {len(leaf)}; name an index, from 0 on")
                return
            index = int(name)
        elif not isinstance(leaf, dict):
            reader.problems.append(f"override {item!r}: {where} is a value, not a section")
            return
        if depth == len(path) - 1:
            leaf[index] = value
        elif isinstance(leaf, list):
            leaf = leaf[index]
        else:
            if leaf.get(index) is None:  # missing, or written without a value
                leaf[index] = {}
            leaf = leaf[index]


def parse_config(values: dict[str, Any]) -> Config:
    """Validates a tree of values; relative paths are relative to the current directory. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_message(_described(error))) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML, defaults included; `load_config` reads it back to an equal one."""
    return write(config.model_dump())


def _resolved(section: type[Section], values: Any, directory: str, prefix: str, problems: list[str]) -> Any:
    """The values of a file with absolute paths and new names, before overrides join them, whose paths are relative to
    elsewhere."""
    if isinstance(values, list):
        return [_resolved(section, v, directory, f"{prefix}{i}.", problems) for i, v in enumerate(values)]
    if not isinstance(values, dict):
        return values
    try:
        values, renamed = with_new_names(section, values)
        for old, new in renamed.items():
            warn_of_old_name(prefix + old, prefix + new)
    except ValueError as error:
        problems.append(f"{prefix.removesuffix('.')}: {error}")
        values = {name: value for name, value in values.items() if name not in section.renamed}
    for name, field in section.model_fields.items():
        if name in values:
            shape = shape_of(field)
            if shape.section:
                values[name] = _resolved(shape.section, values[name], directory, f"{prefix}{name}.", problems)
            elif shape.is_path:
                values[name] = absolute_path(values[name], directory)
    return values


def _message(problems: list[str]) -> str:
    return f"{len(problems)} problem(s) in the config:\n" + "\n".join(f"  {x}" for x in problems)


def _described(error: ValidationError) -> list[str]:
    return [_describe(e) for e in error.errors(include_url=False)]


def _describe(error: Any) -> str:
    path = ".".join(str(x) for x in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_hint(path, str(error['loc'][-1]))}"
    if error["type"] == "missing":
        return f"{path}: required key is missing ({all_keys().get(path, '')})"
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error["input"])
    if isinstance(error["input"], (dict, BaseModel)):
        return f"{path}: {message}"
    return f"{path}: {message} (got {shown if len(shown) <= 200 else shown[:200] + '...'})"


def _hint(path: str, leaf: str) -> str:
    known = all_keys()
    if leaf in known and "." in leaf:
        section, _, name = leaf.rpartition(".")
        return f"; in a file it is written {section}: {{{name}: ...}}"
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    same = [k for k in known if k.split(".")[-1] == leaf]
    similar = [*same, *near]
    return f"; did you mean {similar[0]}?" if similar else ""
