"""The design's import directions, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_opd"
# Floors, top to bottom: a place may import its own row and the rows above it. The documentation shows this table.
FLOORS = (
    ("errors", "files", "moved", "plugins", "types"),
    ("config",),
    ("compat",),
    ("kernels",),
    ("losses",),
    ("prune",),
    ("data",),
    ("parallel",),
    ("models", "weights"),
    ("rollout",),
    ("scoring",),
    ("records", "trackers"),
    ("evaluation",),
    ("checkpoint",),
    ("runtime",),
    ("training",),
    ("analysis", "report"),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {place: number for number, row in enumerate(FLOORS) for place in row}
MODULES = sorted(PACKAGE.rglob("*.py"))


def row_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_upward_only(path):
    place = row_of(path)
    if place == "__init__":
        return
    assert place in FLOOR_OF, f"{place} is not in the table of floors"
    for name in imports(path):
        if name.startswith("megatron_opd."):
            other = name.split(".")[1]
            assert FLOOR_OF[other] <= FLOOR_OF[place], f"{place} imports {name}, from a row below it"


def test_no_circle_of_imports():
    """Also among the modules of one row: each is understood without the ones that use it."""
    named = {f"megatron_opd.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in MODULES}
    needs = {
        name: {other for text in imports(path) for other in (text, text.rpartition(".")[0]) if other in named} - {name}
        for name, path in named.items()
    }
    while free := {name for name, others in needs.items() if not others}:
        needs = {name: others - free for name, others in needs.items() if name not in free}
    assert not needs, f"modules that import each other: {sorted(needs)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_each_row_never_imports(path):
    row, found = row_of(path), names(path)
    where = path.relative_to(PACKAGE).as_posix()
    if row in ("losses", "prune"):
        upper = tuple(f"megatron_opd.{place}" for place in (row, "losses", "kernels", "errors", "plugins", "types"))
        assert all(name.startswith(upper) for name in imports(path) if "megatron" in name)
        assert found <= set(sys.stdlib_module_names) | {"torch", "megatron_opd", "__future__"}
    if row == "kernels":
        assert all(name.startswith("megatron_opd.kernels") for name in imports(path) if "megatron" in name)
        assert found <= set(sys.stdlib_module_names) | {"numpy", "torch", "triton", "megatron_opd", "__future__"}
    else:
        assert "triton" not in found, "kernels/ alone imports Triton"
    if row in ("config", "types"):
        assert not found & {"torch", "megatron", "vllm", "transformers", "mbridge"}
    if row not in ("compat", "weights"):
        assert "mbridge" not in found, "weights/ and compat/ alone import mbridge"
    if not where.startswith(("rollout/vllm/", "compat/")):
        assert "vllm" not in found, "rollout/vllm/ and compat/ alone import vLLM"
    if row in ("data", "models", "weights", "scoring", "training", "evaluation"):
        assert not any(name.startswith("megatron_opd.rollout.vllm") for name in imports(path))
    if row == "data":
        assert not any(name.startswith("megatron_opd.rollout") for name in imports(path))
    if row in ("models", "weights"):
        assert not any(name.startswith("megatron_opd.losses") for name in imports(path))


def test_the_config_loads_without_torch(tmp_path):
    """As on a login node: whatever needs a GPU library is blocked, and checking a config still works."""
    config = tmp_path / "c.yaml"
    config.write_text("student: {model: a}\nteacher: {model: b}\ndata: {prompts: c.jsonl}\n")
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "vllm", "mbridge", "numpy"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
from megatron_opd.config import load_config
import megatron_opd.types
print(load_config({str(config)!r}, ["train.lr=0.5"]).train.lr)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0.5"


def test_the_training_loop_fits_on_a_page():
    tree = ast.parse((PACKAGE / "training/loop.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is longer than a page"
    assert "torch" not in names(PACKAGE / "training/loop.py"), "the loop does no tensor arithmetic"


def test_no_module_is_hard_to_hold_in_mind():
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("tests", "tools", "examples"))]
    for path in (p for folder in folders for p in folder.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 420, f"{path}: {lines} lines"
