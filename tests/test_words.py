"""Names keep to the glossary: a retired word may not be used in more names than tests/retired_words.json records.

python -m tests.test_words          writes the record anew after names have been mended or files have moved
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_opd"
RECORD = Path(__file__).with_name("retired_words.json")
# A packed row of a micro-batch; a table's in data/, trackers/, report/ and analysis.py; a matrix's in weights/ and
# checkpoint/.
ROWS = ("models", "parallel", "scoring", "training", "data", "weights", "checkpoint")
ROWS += ("trackers", "report", "analysis.py")
# Word -> where it still has its one meaning, and the word to use elsewhere.
RETIRED = {
    "answer": (("config", "data", "evaluation", "types.py"), "response; an answer is a prompt's reference answer"),
    "answers": (("config", "data"), "responses"),
    "weight": (("compat", "kernels", "losses", "prune", "scoring", "training", "types.py"), "parameter, head, version"),
    "weights": (("compat", "kernels", "losses", "prune", "scoring", "training", "types.py"), "parameters"),
    "found": ((), "what it is that was found"),
    "owed": ((), "what is still to do: pending, unsaved, remaining"),
    "who": ((), "rank, owner, index"),
    "made": ((), "what it is that was made"),
    "gone": ((), "finished, removed"),
    "place": ((), "position, slot, index, path"),
    "places": ((), "positions, slots, indices, paths"),
    "row": (ROWS, "token, sequence, span, line"),
    "rows": (ROWS, "tokens, sequences, span, lines"),
}
# Names of another library's interface, which it calls or hands over by these names.
OTHERS = {
    "rollout/vllm/native.py": {"weight", "weights"},  # vLLM's client of servers
    "rollout/vllm/weight_transfer.py": {"weight", "weights"},  # vLLM's WeightTransferEngine
    "weights/hf_files.py": {"weight"},  # weight_map of a safetensors index
    "config/training.py": {"weight"},  # weight_decay
    "training/run.py": {"row"},  # bad_in_a_row
}


def names(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives: of functions, classes, arguments, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words(name: str) -> set[str]:
    return set(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_"))


def uses(path: Path) -> Counter[str]:
    """Retired word -> how many of the file's names hold it."""
    name, floor = path.relative_to(PACKAGE).as_posix(), path.relative_to(PACKAGE).parts[0]
    retired = {word for word, (allowed, _) in RETIRED.items() if floor not in allowed} - OTHERS.get(name, set())
    counted: Counter[str] = Counter()
    for name in names(ast.parse(path.read_text(encoding="utf-8"))):
        counted.update(words(name) & retired)
    return counted


def everywhere() -> dict[str, dict[str, int]]:
    used = {path.relative_to(PACKAGE).as_posix(): uses(path) for path in sorted(PACKAGE.rglob("*.py"))}
    return {path: dict(sorted(counted.items())) for path, counted in used.items() if counted}


def test_a_retired_word_is_seen_in_every_kind_of_name():
    code = "class OwedWork: ...\ndef f(who, *, x=1):\n    a_place: int = 0\n    for made in y: x.gone = found\n"
    counted = Counter(word for name in names(ast.parse(code)) for word in words(name))
    assert {word for word in counted if word in RETIRED} == {"owed", "who", "place", "made", "gone"}
    assert words("modelAnswers") == {"model", "answers"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_new_name_uses_a_retired_word(path):
    recorded = json.loads(RECORD.read_text()).get(path.relative_to(PACKAGE).as_posix(), {})
    for word, count in uses(path).items():
        most, instead = recorded.get(word, 0), RETIRED[word][1]
        assert count <= most, f"{count} names with {word!r}, recorded are {most}; say instead: {instead}"


def test_the_record_names_nothing_that_has_been_mended():
    now = everywhere()
    for path, counted in json.loads(RECORD.read_text()).items():
        left = now.get(path, {})
        stale = sorted(set(counted) - set(left))
        assert not stale, f"{path} has no name with {stale} any more: python -m tests.test_words"


if __name__ == "__main__":
    RECORD.write_text(json.dumps(everywhere(), indent=1) + "\n")
