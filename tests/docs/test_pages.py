"""What README and docs say of the tree: files, keys, messages, floors and words that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import megatron_opd.types
from megatron_opd.config import all_keys
from tests.docs.pages import PAGES, READMES, inline
from tests.test_imports import FLOORS
from tests.tiny_run import REPOSITORY

PACKAGE = REPOSITORY / "megatron_opd"
IDS = [str(p.relative_to(REPOSITORY)) for p in (*PAGES, *READMES)]
KEYS = set(all_keys()) | {key.rpartition(".")[0] for key in all_keys()}
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
MADE = ("build/", "runs/", ".gpu/", "checkpoints/")  # what running makes


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=IDS)
def test_files_that_are_named_exist(page: Path):
    missing = []
    for code in inline(page):
        if re.fullmatch(r"\.?[\w-]+(/[\w.*-]+)*/?(\.\w+)?", code) and "/" in code and not code.startswith(MADE):
            places = [root for root in (REPOSITORY, PACKAGE, page.parent) if list(root.glob(code.rstrip("/")))]
            if not places and code.split("/")[0] in {p.name for p in (*REPOSITORY.iterdir(), *PACKAGE.iterdir())}:
                missing.append(code)
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=IDS)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=IDS)
def test_config_keys_that_are_named_exist(page: Path):
    unknown = []
    if page.name == "faq.md":  # other projects' keys look alike; the column "here" has a test of its own
        return
    for code in inline(page):
        match = re.match(rf"((?:{'|'.join(SECTIONS)})(?:\.[\w*]+)+)(?:[:=]|$)", code)
        if match and not re.search(r"\.(py|md|yaml|jsonl?|csv|sh|log)$", match[1]):
            key = re.sub(r"\.\*|\.\d+", "", match[1])
            if key not in KEYS:
                unknown.append(code)
    assert not unknown


def test_the_faqs_own_column_holds_keys():
    text = (REPOSITORY / "docs" / "faq.md").read_text()
    for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE):
        for code in re.findall(r"`([a-z_]+\.[\w.*]+)", row):
            assert code.removesuffix(".*") in KEYS, code


def test_the_floors_are_those_that_the_imports_keep():
    text = (REPOSITORY / "docs" / "concepts.md").read_text()
    table = text[text.index("| floor | holds |") :]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(FLOORS)


def test_the_glossary_has_every_word_of_the_codes_own():
    words = re.findall(r"^(\w[\w ,-]+?)  +", megatron_opd.types.__doc__ or "", re.MULTILINE)
    text = (REPOSITORY / "docs" / "concepts.md").read_text()
    assert len(words) >= 10
    assert not [word for word in words if f"| {word} |" not in text]


@cache
def strings() -> list[str]:
    """Every string of the package and the job scripts; what an f-string fills in is a null byte."""
    found = [p.read_text() for p in (*REPOSITORY.glob("slurm/*.py"), *REPOSITORY.glob("slurm/*.sh"))]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(parts))
    return found


def test_messages_that_are_explained_are_really_said():
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    table = text[text.index("| symptom |") : text.index("## What a curve means")]
    unsaid = []
    for symptom in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:]:
        for message in re.findall(r"`([^`]+)`", symptom):
            for piece in re.split(r"\.\.\.|\bN\b|: NODE", message):
                if len(piece.strip()) > 8 and not any(piece.strip() in s for s in strings()):
                    unsaid.append(piece)
    assert not unsaid


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 130


def test_nothing_points_to_a_place_that_a_reader_does_not_have():
    bad = []
    for pattern in (
        "megatron_opd/**/*.py",
        "tests/**/*.py",
        "tests/**/*.sh",
        "tools/**/*.py",
        "slurm/*",
        "docs/**/*.md",
    ):
        for path in filter(Path.is_file, REPOSITORY.glob(pattern)):
            text = path.read_text()
            if path != Path(__file__) and re.search(r"\.\./shared|/work/", text):
                bad.append(str(path.relative_to(REPOSITORY)))
    assert not bad
