"""Private names of the libraries stand in compat/ alone, where each is tested against the installed version."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_opd"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "compat"]
OURS = ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> list[str]:
    """Names with a leading underscore that a file takes from elsewhere, each with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {name for node in ast.walk(tree) for name in names_given(node)}
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if not str(node.module).startswith("megatron_opd"):
                taken += [(node.lineno, alias.name) for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            # What the file itself defines is no library's, whatever object it is read from; os._exit is documented.
            own_object = isinstance(node.value, ast.Name) and node.value.id in OURS
            if not own_object and node.attr not in own and node.attr != "_exit":
                taken.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and str(name.value) not in own:
                taken.append((node.lineno, str(name.value)))
    return [f"{path.relative_to(PACKAGE)}:{line}: {name}" for line, name in taken]


def names_given(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if isinstance(node.value, ast.Name) and node.value.id in OURS else []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return []


def test_no_file_outside_compat_takes_a_private_name():
    taken = [text for path in MODULES for text in private_names(path)]
    assert not taken, "give it a function in megatron_opd/compat/, with a test in tests/compat/:\n" + "\n".join(taken)


@pytest.mark.parametrize(
    "line",
    [
        "from torch.distributed.checkpoint.utils import _DistWrapper",
        "engine._finalizer.detach()",
        "getattr(module, '_fp8_workspaces', {}).clear()",
        "module._forward_impl = print",
    ],
)
def test_the_check_sees_each_way_of_taking_one(line, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.compat.test_private_names.PACKAGE", tmp_path)
    path = tmp_path / "m.py"
    path.write_text(f"def _own(): pass\n_own()\n{line}\n")
    assert len(private_names(path)) == 1


def overridden(base: type, path: Path) -> list[str]:
    """Private methods of `base` that a class in a file replaces."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = [
        item.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and base.__name__ in {getattr(b, "id", getattr(b, "attr", "")) for b in node.bases}
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    ]
    return [name for name in methods if is_private(name) and hasattr(base, name)]


def test_no_class_outside_compat_replaces_a_library_s_private_method():
    from megatron.core.transformer.module import MegatronModule
    from torch.nn import Module

    from megatron_opd.compat.megatron import P2PWithKnownShapes

    for base in (P2PWithKnownShapes, MegatronModule, Module):
        for path in MODULES:
            assert not overridden(base, path), path
