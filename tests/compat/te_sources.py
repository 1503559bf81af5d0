"""Python sources of Transformer Engine, read without running them: which names there are, which keywords a call takes.

`make install-test` downloads the wheels (1 MB each, no bindings) beside the environment, where nothing can import them.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

WHEELS = sorted(Path(sys.prefix, "transformer_engine").glob("*.whl"))


@dataclass
class Signature:
    """Parameters of a function in their order, `self` left out."""

    names: list[str] = field(default_factory=list)
    required: set[str] = field(default_factory=set)
    any_keyword: bool = False


class Sources:
    """Modules by dotted name. `files`: path in the archive or folder -> text."""

    def __init__(self, files: dict[str, str], version: str) -> None:
        self.files, self.version = files, version
        self._trees: dict[str, ast.Module] = {}

    @classmethod
    def of_wheel(cls, wheel: Path) -> Sources:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            return cls({name: archive.read(name).decode() for name in names}, wheel.name.split("-")[1])

    @classmethod
    def of_folder(cls, folder: Path, version: str) -> Sources:
        return cls({path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}, version)

    def path(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in self.files), None)

    def tree(self, module: str) -> ast.Module:
        path = self.path(module)
        assert path is not None, f"transformer_engine {self.version} has no module {module}"
        if path not in self._trees:
            self._trees[path] = ast.parse(self.files[path])
        return self._trees[path]

    def find(self, module: str, name: str, seen: frozenset = frozenset()) -> tuple[str, ast.AST] | None:
        """Where a module gets a name from: the module that defines it and the definition. Imports are followed."""
        if self.path(module) is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in _top_level(self.tree(module)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        wanted = name if alias.name == "*" else alias.name
                        if found := self.find(source, wanted, seen):
                            return found
                        if self.path(f"{source}.{wanted}"):
                            return f"{source}.{wanted}", self.tree(f"{source}.{wanted}")
            if isinstance(node, ast.Import) and any((a.asname or a.name.split(".")[0]) == name for a in node.names):
                return module, node
        inner = f"{module}.{name}"
        return (inner, self.tree(inner)) if self.path(inner) else None

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".") if (self.path(module) or "").endswith("__init__.py") else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def members(self, module: str, node: ast.ClassDef) -> dict[str, ast.AST]:
        """Methods, properties, attributes and what methods set on self, of a class and its bases in these sources."""
        found: dict[str, ast.AST] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Attribute) and ast.unparse(base).startswith("torch."):
                continue
            name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", None)
            place = self.find(module, name) if name else None
            if place and isinstance(place[1], ast.ClassDef):
                found |= self.members(place[0], place[1])
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef) and part in node.body:
                found[part.name] = part
            elif isinstance(part, ast.AnnAssign | ast.Assign):
                for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                    for each in ast.walk(target):
                        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                            found.setdefault(each.attr, part)
                        elif isinstance(each, ast.Name) and part in node.body:
                            found.setdefault(each.id, part)
        return found

    def takes(self, module: str, name: str) -> Signature:
        """The signature of a function, or of a class's constructor (a dataclass's fields, too)."""
        place = self.find(module, name)
        assert place is not None, f"transformer_engine {self.version}: {module} has no {name}"
        if isinstance(place[1], ast.FunctionDef):
            return signature(place[1], method=False)
        assert isinstance(place[1], ast.ClassDef), (module, name)
        init = self.members(*place).get("__init__")
        if isinstance(init, ast.FunctionDef):
            return signature(init, method=True)
        fields = [
            part for part in place[1].body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
        required = {part.target.id for part in fields if part.value is None}
        # the recipes are dataclasses of pydantic, which pass over what they do not know
        lenient = "from pydantic.dataclasses import dataclass" in self.files[self.path(place[0]) or ""]
        return Signature([part.target.id for part in fields], required, lenient)

    @cached_property
    def words(self) -> set[str]:
        """Every attribute, parameter, keyword and function name anywhere."""
        found: set[str] = set()
        for text in self.files.values():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.arg | ast.keyword) and node.arg:
                    found.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
        return found


def signature(function: ast.FunctionDef, method: bool) -> Signature:
    takes = function.args
    names = [arg.arg for arg in (*takes.posonlyargs, *takes.args)]
    required = set(names[: len(names) - len(takes.defaults)])
    names += [arg.arg for arg in takes.kwonlyargs]
    required |= {arg.arg for arg, default in zip(takes.kwonlyargs, takes.kw_defaults) if default is None}
    if method:
        required.discard(names.pop(0))
    return Signature(names, required, takes.kwarg is not None)


def _top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements of a module, those under if, try and with included."""
    found: list[ast.stmt] = []
    queue = list(tree.body)
    while queue:
        node = queue.pop(0)
        found.append(node)
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                queue += getattr(node, block, [])
        for handler in getattr(node, "handlers", []):
            queue += handler.body
    return found
