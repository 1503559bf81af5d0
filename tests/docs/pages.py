"""README, CONTRIBUTING and the pages of docs/ as text, code blocks, inline code and commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_run import REPOSITORY

PAGES = sorted(
    p
    for p in [*REPOSITORY.glob("docs/**/*.md"), *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md"))]
    if p.name not in ("changelog.md", "contributing.md")  # they show CHANGELOG and CONTRIBUTING
)
READMES = sorted(REPOSITORY.glob("examples/*/README.md"))
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}: {self.text.strip().splitlines()[0][:60]}"


def with_snippets(page: Path) -> str:
    """The page as its reader sees it."""
    return _SNIPPET.sub(lambda m: (REPOSITORY / m["path"]).read_text(), page.read_text())


def blocks(*languages: str) -> list[Block]:
    """Fenced blocks of all pages and READMEs, of these languages or of all."""
    found = []
    for page in (*PAGES, *READMES):
        for match in _FENCE.finditer(with_snippets(page)):
            language = match["info"].split(" ")[0]
            if not languages or language in languages:
                found.append(Block(page, language, match["body"]))
    return found


def inline(page: Path) -> list[str]:
    """What stands between backticks outside fenced blocks."""
    return _INLINE.findall(_FENCE.sub("", page.read_text()))


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words: without comments, variables in front, and what joins them."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in ("&&", "||", "|"):
                found.append(words)
                words = []
            else:
                words.append(word)
        found.append(words)
    return [kept for words in found if (kept := _without_variables(words))]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words
