"""The config's keys as data: path, type, default, bounds and documentation, read from the sections themselves."""

from __future__ import annotations

import datetime
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_opd.config.base import LARGEST_COUNT, LARGEST_SEED, IsPath, Names, Section
from megatron_opd.config.root import Config

UNBOUNDED = (LARGEST_COUNT, LARGEST_SEED)  # what a number's own size allows is no bound that a reader looks for


@dataclass(frozen=True)
class Shape:
    """What a key's annotation says, without the parts that Python needs."""

    base: Any  # bool, int, float, str, dict, list, a Literal's tuple of values, or a Section
    marks: tuple[Any, ...] = ()  # bounds, IsPath, Names
    nullable: bool = False
    item: Shape | None = None  # of a list

    @property
    def section(self) -> type[Section] | None:
        """The section that stands here, or of which this is a list."""
        inner = self.item.base if self.item else self.base
        return inner if isinstance(inner, type) and issubclass(inner, Section) else None

    @property
    def is_text(self) -> bool:
        return self.base in (str, datetime.date) or isinstance(self.base, tuple)

    @property
    def is_path(self) -> bool:
        return any(isinstance(mark, IsPath) for mark in self.marks)


def shape_of(field: FieldInfo) -> Shape:
    return _shape(field.annotation, tuple(field.metadata))


def _shape(annotation: Any, marks: tuple[Any, ...]) -> Shape:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        flat: list[Any] = []
        for mark in arguments[1:]:
            flat += mark.metadata if isinstance(mark, FieldInfo) else [mark]
        return _shape(arguments[0], (*flat, *marks))
    if origin in (Union, types.UnionType):
        (inner,) = [a for a in arguments if a is not type(None)]
        shape = _shape(inner, marks)
        return Shape(shape.base, shape.marks, True, shape.item)
    if origin is Literal:
        return Shape(arguments, marks)
    if origin is list:
        return Shape(list, marks, item=_shape(arguments[0], ()))
    return Shape(origin or annotation, marks)


@dataclass(frozen=True)
class Key:
    """One key of the config; `path` has its sections in front, an entry of a list without its index."""

    path: str
    field: FieldInfo

    @property
    def shape(self) -> Shape:
        return shape_of(self.field)

    @property
    def text(self) -> str:
        """Its documentation, in one line."""
        return " ".join((self.field.description or "").split())

    @property
    def type(self) -> str:
        shape = self.shape
        names: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
        names[datetime.date] = "date"
        if shape.item is not None:
            name = "list of " + ("sections" if shape.section else "texts")
        elif shape.section:
            name = "section"
        elif shape.is_path:
            name = "path"
        else:
            name = "text" if isinstance(shape.base, tuple) else names[shape.base]
        return f"{name} or null" if shape.nullable else name

    @property
    def default(self) -> str:
        """As one writes it in YAML; "required" where there is none."""
        if self.field.is_required():
            return "required"
        if self.field.default is PydanticUndefined:
            default = self.field.default_factory() if self.field.default_factory else None  # type: ignore[call-arg]
            return "" if isinstance(default, Section) else str(default)
        if isinstance(self.field.default, float):
            return f"{self.field.default:g}"
        return yaml.safe_dump(self.field.default, default_flow_style=True, width=200).removesuffix("\n...\n").strip()

    @property
    def allowed(self) -> str:
        """Names or bounds; empty where its type says all."""
        shape, parts = self.shape, []
        if isinstance(shape.base, tuple):
            parts.append(", ".join(shape.base))
        for mark in shape.marks:
            if isinstance(mark, Names):
                parts.append(", ".join([*mark.known, "MODULE:NAME"]))
            elif isinstance(mark, annotated_types.Gt):
                parts.append(f"above {mark.gt:g}" if mark.gt else "above 0")  # type: ignore[str-format]
            elif isinstance(mark, annotated_types.Ge) and abs(mark.ge) not in UNBOUNDED:  # type: ignore[arg-type,operator]
                parts.append(f"at least {mark.ge:g}")  # type: ignore[str-format]
            elif isinstance(mark, annotated_types.Lt):
                parts.append(f"below {mark.lt:g}")  # type: ignore[str-format]
            elif isinstance(mark, annotated_types.Le) and mark.le not in UNBOUNDED:
                parts.append(f"at most {mark.le:,}")  # type: ignore[str-format]
        return ", ".join(parts)


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key, each section before what it holds."""
    for name, field in section.model_fields.items():
        key = Key(prefix + name, field)
        yield key
        if inner := key.shape.section:
            yield from keys(inner, f"{prefix}{name}.")


def all_keys() -> dict[str, str]:
    """Every key's full path and its documentation."""
    return {key.path: key.text for key in keys()}


def reference() -> str:
    """The page of the documentation: a table of keys for every section."""
    pages: dict[str, list[Key]] = {"": []}
    titles = {"": "Top level"}
    for key in keys():
        pages[key.path.rpartition(".")[0]].append(key)
        if key.shape.section:
            pages[key.path] = []
            titles[key.path] = f"`{key.path}`" + (", a list" if key.shape.item else "")
    text = [
        "# Config reference",
        "",
        "<!-- Made by `megatron-opd keys --markdown` from the config's own docstrings; a test compares. -->",
        "",
        "Every key with its type, default and bounds; `megatron-opd keys WORD` prints those that have a word. Paths in",
        "a file are relative to that file, those of overrides to the current directory; `$NAME` and `~` are filled in.",
        "A key that holds text takes what is written (`off`, `2024`). Numbers that YAML's readers read differently",
        "(`010`, `1:30`) are refused, and so is a key that is written twice.",
    ]
    described = {key.path: key.text for key in keys()}
    for path, held in pages.items():
        text += ["", f"## {titles[path]}", ""]
        if path:
            text += [described[path], ""]
        text += ["| key | type | default | what it is |", "|---|---|---|---|"]
        for key in held:
            name = key.path.rpartition(".")[2]
            kind = key.type + (f": {key.allowed}" if key.allowed else "")
            default = f"`{key.default}`" if key.default not in ("", "required") else key.default
            text.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(key.text)} |")
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
