"""YAML, read by what each key is: a text key takes what is written, a number key numbers.

PyYAML reads YAML 1.1, where `on` is true, `010` is 8, `1:30` is 90, `1e-6` is text and a date is an object, and where
of two equal keys the last one wins. Here plain words are read as YAML 1.2's core schema has them; what could still mean
two things is a problem with its line and what to write instead. Problems are gathered, not raised.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_opd.config.keys import Shape, shape_of

FREE = Shape(object)  # a value whose type no key gives: a part's own options, an unknown key
MOST_NODES = 100_000  # aliases of aliases could make any number of them
# Plain words that some readers of YAML take for something else than text
TWO_MEANINGS = re.compile(
    r"(?P<switch>y|n|yes|no|on|off)|(?P<octal>[-+]?0[0-9_]+)|(?P<date>\d{4}-\d\d?-\d\d?([Tt ].*)?)|"
    r"(?P<sexagesimal>[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?)|(?P<binary>[-+]?0b[01_]+)",
    re.IGNORECASE,
)
_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
)


class _Core(yaml.SafeLoader):
    """Composes nodes whose plain words have the tags of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Writer(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _name, _pattern, _first in _CORE:
    _Core.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
    _Writer.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def write(values: Any) -> str:
    """YAML that this module, and PyYAML, read back to the same values."""
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=False)


class Reader:
    """Reads a file and overrides; `problems` says everything that is wrong with them, one text each."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._nodes = 0

    def file(self, text: str, name: str, section: type[Any]) -> dict[str, Any] | None:
        """The values of a whole file; None where it is no mapping of keys, which is a problem."""
        node = self._compose(text, f"{name} is not valid YAML")
        if node is None:
            return None if self.problems else {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
            self.problems.append(f"{name} must hold a mapping of keys, found {kind}")
            return None
        values = self._guarded(node, Shape(section), "", name)
        return values if isinstance(values, dict) else None

    def override(self, item: str, key: str, text: str, shape: Shape) -> Any:
        """The value of `key=text`. For a key that holds text it is the text itself, unless it is quoted as a whole."""
        where = f"override {item!r}"
        if shape.is_text:
            quoted = self._quoted(text)
            if quoted is not None:
                return self._checked_text(quoted, key, where)
            if shape.nullable and text.strip() in ("", "null", "~"):
                return None
            return self._checked_text(text, key, where)
        before = len(self.problems)
        node = self._compose(text, f"{where}: the value is not valid YAML")
        if node is None or len(self.problems) > before:
            return None
        cut = _cut_off(text)
        if cut:
            self.problems.append(f"{where}: YAML ends a value at ' #' and drops {cut!r}; quote it or leave that out")
        return self._guarded(node, shape, key, where)

    def _quoted(self, text: str) -> str | None:
        """What stands between quotes, where all of `text` is one quoted YAML scalar."""
        if text.strip()[:1] not in ("'", '"'):
            return None
        try:
            node = yaml.compose(text, Loader=_Core)
        except (yaml.YAMLError, RecursionError):
            return None
        if not isinstance(node, yaml.ScalarNode) or node.style not in ("'", '"') or _cut_off(text):
            return None
        return str(node.value)

    def _compose(self, text: str, problem: str) -> yaml.Node | None:
        try:
            return yaml.compose(text, Loader=_Core)  # type: ignore[no-any-return]
        except yaml.YAMLError as error:
            self.problems.append(f"{problem}: {' '.join(str(error).split())}")
        except RecursionError:
            self.problems.append(f"{problem}: it is nested too deeply")
        return None

    def _guarded(self, node: yaml.Node, shape: Shape, key: str, where: str) -> Any:
        self._nodes = 0
        try:
            return self._value(node, shape, key, where, ())
        except RecursionError:
            self.problems.append(f"{where}: is nested too deeply")
        except OverflowError:
            self.problems.append(f"{where}: aliases (*name) make more than {MOST_NODES} values of it")
        return None

    def _value(self, node: yaml.Node, shape: Shape, key: str, where: str, outside: tuple[int, ...]) -> Any:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise OverflowError
        if id(node) in outside:
            self.problems.append(
                f"{_at(node, where)}: {key or 'the config'} contains itself (*{node.start_mark.line + 1})"
            )
            return None
        inside = (*outside, id(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, shape, key, where)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.problems.append(
                f"{_at(node, where)}: {key}: the tag {_short(node.tag)} is not known here; leave it out"
            )
            return None
        if isinstance(node, yaml.SequenceNode):
            item = shape.item or FREE
            return [
                self._value(n, item, f"{key}.{i}" if key else str(i), where, inside) for i, n in enumerate(node.value)
            ]
        return self._mapping(node, shape, key, where, inside)

    def _mapping(self, node: Any, shape: Shape, key: str, where: str, inside: tuple[int, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{_at(key_node, where)}: {key or 'the config'}: a key must be a word")
                continue
            name = key_node.value
            line = key_node.start_mark.line + 1
            full = f"{key}.{name}" if key else name
            if name in lines:
                self.problems.append(
                    f"{_at(key_node, where)}: {full}: is written twice, also in line {lines[name]}; keep one"
                )
                continue
            lines[name] = line
            if name == "<<" and key_node.style is None:
                merged = self._merged(value_node, shape, key, where, inside) | merged
            else:
                own[name] = self._value(value_node, shape_at(shape.base, [name]), full, where, inside)
        return merged | own

    def _merged(self, node: yaml.Node, shape: Shape, key: str, where: str, inside: tuple[int, ...]) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                self.problems.append(f"{_at(part, where)}: {key or 'the config'}: << takes mappings alone")
                continue
            values = self._value(part, shape, key, where, inside)
            result = (values or {}) | result  # the first one wins
        return result

    def _scalar(self, node: yaml.ScalarNode, shape: Shape, key: str, where: str) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        if tag not in ("str", "null", "bool", "int", "float"):
            self.problems.append(
                f"{_at(node, where)}: {key}: the tag {_short(node.tag)} is not known here; leave it out"
            )
            return None
        plain = node.style is None
        if plain and tag == "null":
            return None
        if not plain or shape.is_text:
            return self._checked_text(text, key, _at(node, where))
        if shape.base in (int, float) and tag == "bool":
            self.problems.append(f"{_at(node, where)}: {key}: needs a number, and {text} is none")
            return None
        meaning = TWO_MEANINGS.fullmatch(text)
        if meaning and shape.base is not bool:
            self.problems.append(f"{_at(node, where)}: {key}: {_meanings(text, str(meaning.lastgroup), shape)}")
            return None
        try:
            if tag == "bool":
                return text.lower() == "true"
            if tag == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if tag == "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        except ValueError:
            self.problems.append(f"{_at(node, where)}: {key}: {text[:40]}... is too long for a number")
            return None
        return self._checked_text(text, key, _at(node, where))

    def _checked_text(self, text: str, key: str, where: str) -> str:
        if wrong := re.search("[\0\ud800-\udfff]", text):
            what = "a null byte" if wrong[0] == "\0" else "half of a character, which no file can hold"
            self.problems.append(f"{where}: {key}: holds {what} (at position {wrong.start()})")
            return ""
        return text


def shape_at(section: Any, path: list[str]) -> Shape:
    """What lies at this path below a section, a number being an index into a list; FREE where there is nothing."""
    shape = Shape(section)
    for name in path:
        fields = getattr(shape.base, "model_fields", {})
        old_names = getattr(shape.base, "renamed", {})
        if shape.item is not None and name.isdigit():
            shape = shape.item
        elif name in fields:
            shape = shape_of(fields[name])
        elif name in old_names:
            shape = shape_at(shape.base, old_names[name].split("."))
        else:
            return FREE
    return shape


def _at(node: yaml.Node, where: str) -> str:
    return where if where.startswith("override") else f"{where}, line {node.start_mark.line + 1}"


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _meanings(text: str, kind: str, shape: Shape) -> str:
    number = shape.base in (int, float)
    if kind == "octal":
        digits = text.replace("_", "").lstrip("+-")
        octal = f" or {int(digits, 8)} (octal)" if re.fullmatch("[0-7]+", digits) else ""
        return f"{text} may mean {int(digits)}{octal}; write the one you mean without a leading 0"
    if kind == "sexagesimal":
        remedy = "write the number" if number else "put it into quotes"
        return f"{text} is a number to the base of 60 to some readers of YAML; {remedy}"
    if kind == "binary":
        return f"{text}: binary numbers are not read here; write {int(text.replace('_', ''), 0)}"
    if kind == "date":
        return f"{text} may be a date; " + ("a number is needed" if number else f'write "{text}"')
    if number:
        return f"needs a number, and {text} is none"
    return f'{text} may be text or true/false; write "{text}", or true or false'


def _cut_off(text: str) -> str:
    """What a comment takes away from a value."""
    end = 0
    for token in yaml.scan(text, Loader=_Core):
        gap = text[end : token.start_mark.index].strip()
        if gap:
            return gap
        end = max(end, token.end_mark.index)
    return text[end:].strip()
