"""`megatron-opd keys [WORD ...]`: the config's keys with type, default, allowed values and documentation."""

from __future__ import annotations

import textwrap

from megatron_opd.config.keys import Key, keys, reference
from megatron_opd.errors import InputError


def print_keys(words: list[str], markdown: bool = False) -> None:
    """Prints the keys in whose path, allowed values or documentation every word is found; with `markdown` the page of
    the documentation, which has all of them. Raises InputError where no key has the words."""
    if markdown:
        print(reference(), end="")
        return
    matching = [key for key in keys() if all(word.lower() in _searched(key) for word in words)]
    if not matching:
        raise InputError(f"keys: no key has {' and '.join(map(repr, words))} in its name or documentation")
    for key in matching:
        print(f"{key.path}  {describe(key)}")
        for line in textwrap.wrap(key.text, 116):
            print(f"    {line}")


def describe(key: Key) -> str:
    """Type, default and allowed values in one line."""
    default = "required" if key.default == "required" else f"default {key.default}" if key.default else ""
    return "; ".join(part for part in (key.type, default, key.allowed) if part)


def _searched(key: Key) -> str:
    return f"{key.path} {key.allowed} {key.text}".lower()
