"""Code blocks and commands of README and docs: Python compiles and imports, YAML validates, commands parse."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import sys
from typing import Any

import pytest
import yaml

from megatron_opd.cli import make_parser
from megatron_opd.commands.gate import Gate
from megatron_opd.config import all_keys, parse_config
from tests.docs.pages import PAGES, READMES, Block, blocks, commands, inline
from tests.tiny_run import REPOSITORY

LEAST: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"prompts": "p.jsonl"}}
ELSEWHERE = {"pip", "git", "export", "docker", "apptainer", "scancel", "CONFIG"}  # others' commands
KEYS = set(all_keys()) | {key.rpartition(".")[0] for key in all_keys()}


def test_every_block_names_its_language():
    strange = [str(b) for b in blocks() if b.language not in ("bash", "python", "yaml", "text")]
    assert not strange


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_its_imports_resolve(block: Block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_config_or_a_gate(block: Block, monkeypatch: pytest.MonkeyPatch):
    for name in ("STUDENT", "TEACHER", "PROMPTS", "RUN_DIR"):
        monkeypatch.setenv(name, f"/data/{name}")
    values = yaml.safe_load(block.text)
    if "steps" in values:
        Gate.model_validate(values)
    else:
        parse_config({**LEAST, **values})


def command_lines() -> list[tuple[str, list[str]]]:
    found = [(str(block), words) for block in blocks("bash") for words in commands(block.text)]
    for page in (*PAGES, *READMES):
        for code in inline(page):
            mentioned = re.fullmatch(r"megatron-opd [a-z]+", code) and not code.endswith(("keys", "gate"))
            if re.match(r"(make|megatron-opd|python) [^.]", code) and "..." not in code and not mentioned:
                found += [(f"{page.name}: {code}", words) for words in commands(code)]
    return found


class Parsed(Exception):
    """The script has parsed its arguments."""


def parse_with_the_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script until its parser has taken the arguments; SystemExit where it refuses them."""
    plain = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [str((REPOSITORY / script).parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def check_overrides(words: list[str]) -> None:
    for word in words:
        key = re.sub(r"\.\d+", "", word.partition("=")[0])
        assert key == "key" or key in KEYS, f"{word}: no such key"


@pytest.mark.parametrize(("where", "words"), command_lines(), ids=[where for where, _ in command_lines()])
def test_commands_parse(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name == "make":
        heads = re.findall(r"^([a-z][a-z -]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        targets = {target for head in heads for target in head.split()}
        asked = [w for w in rest if "=" not in w]
        assert set(asked) <= targets, f"the Makefile has no {set(asked) - targets}"
    elif name == "megatron-opd":
        options, more = make_parser().parse_known_args(rest)
        named = [w for _, *own in getattr(options, "variant", None) or [] for w in own]
        check_overrides([*getattr(options, "overrides", []), *more, *named])
    elif name in ("python", "python3") and rest[0].endswith(".py"):
        script = rest[0]
        assert (REPOSITORY / script).is_file(), f"{script} does not exist"
        if rest[1:] == ["--help"]:
            return
        parse_with_the_script(script, rest[1:], monkeypatch)
    elif name == "sbatch":
        script = next(w for w in rest if not w.startswith("-"))
        assert (REPOSITORY / script).is_file(), f"{script} does not exist"
        check_overrides(rest[rest.index(script) + 1 :])
    elif name.endswith(".sh"):
        assert (REPOSITORY / name).is_file(), f"{name} does not exist"
    else:
        assert name in ELSEWHERE or name in ("python", "pre-commit", "python3"), (
            f"{name}: no command that is known here"
        )
