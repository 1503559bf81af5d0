"""Reads YAML and overrides into a `Config`, and writes one out; all problems are reported at once."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_opd.config.base import PathBase, Section, absolute_path
from megatron_opd.config.root import Config
from megatron_opd.errors import ConfigError


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides (values are YAML) and validates the whole.

    Raises:
        ConfigError: every problem at once, with key, value and remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(values).__name__}")
    _resolve_paths(Config, values, str(Path(path).resolve().parent))
    for item in overrides or []:
        key, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"override {item!r} is not of the form key.path=value")
        _override(values, item, key.strip().split("."), yaml.safe_load(value))
    return parse_config(values)


def _override(values: dict[str, Any], item: str, path: list[str], value: Any) -> None:
    """Sets one key; a number in the path is a place in a list (eval.sets.0.limit)."""
    leaf: Any = values
    for depth, name in enumerate(path):
        if isinstance(leaf, list):
            if not name.isdigit() or int(name) >= len(leaf):
                where = ".".join(path[:depth])
                raise ConfigError(f"override {item!r}: {where} is a list of {len(leaf)}; name a place from 0 on")
            place: Any = int(name)
        elif isinstance(leaf, dict):
            place = name
        else:
            raise ConfigError(f"override {item!r}: {'.'.join(path[:depth])} is a value, not a section")
        if depth == len(path) - 1:
            leaf[place] = value
        elif isinstance(leaf, list):
            leaf = leaf[place]
        else:
            leaf = leaf.setdefault(place, {})


def parse_config(values: dict[str, Any]) -> Config:
    """Validates a tree of values; relative paths are relative to the current directory. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_describe(e) for e in error.errors()]
        raise ConfigError(f"{len(lines)} problem(s) in the config:\n" + "\n".join(f"  {x}" for x in lines)) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML, defaults included; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def all_keys() -> dict[str, str]:
    """Every key's full path and its documentation."""
    found: dict[str, str] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            found[prefix + name] = field.description or ""
            inner = _section_of(field.annotation)
            if inner:
                walk(inner, f"{prefix}{name}.")

    walk(Config, "")
    return found


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _resolve_paths(section: type[BaseModel], values: Any, directory: str) -> None:
    """Makes the paths of a YAML file absolute, before overrides that are relative to elsewhere join them."""
    if isinstance(values, list):
        for value in values:
            _resolve_paths(section, value, directory)
    if not isinstance(values, dict):
        return
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        inner = _section_of(field.annotation)
        if inner:
            _resolve_paths(inner, values[name], directory)
        elif any(getattr(m, "func", None) is absolute_path for m in _metadata(field)):
            PathBase.directory = directory
            try:
                values[name] = absolute_path(values[name])
            finally:
                PathBase.directory = "."


def _metadata(field: Any) -> list[Any]:
    found = list(field.metadata)
    for argument in getattr(field.annotation, "__args__", ()):
        found += getattr(argument, "__metadata__", ())
    return found


def _describe(error: Any) -> str:
    path = ".".join(str(x) for x in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, all_keys(), n=1, cutoff=0.5)
        leaf = error["loc"][-1]
        same = [k for k in all_keys() if k.split(".")[-1] == leaf]
        hint = same[0] if same else (near[0] if near else None)
        return f"{path}: unknown key" + (f"; did you mean {hint}?" if hint else "")
    if error["type"] == "missing":
        return f"{path}: required key is missing ({all_keys().get(path, '')})"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
    return f"{path}: {message}{shown}"
