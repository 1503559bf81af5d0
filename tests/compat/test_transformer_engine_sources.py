"""What Megatron-Core, this package and the stand-in of tests/te_stand_in take from Transformer Engine is there.

The real one cannot be imported without a GPU's compiler; its Python sources can be read. `make install-test` downloads
them; where they are not there the tests are skipped.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_opd.compat.versions import installed, supported, within
from tests.compat.te_sources import WHEELS, Signature, Sources, signature
from tests.stand_in import STAND_IN

REAL = [Sources.of_wheel(wheel) for wheel in WHEELS]
REAL = [sources for sources in REAL if within(sources.version, supported("transformer-engine"))]
STANDS_IN = Sources.of_folder(STAND_IN, "stand-in")
PACKAGE = Path(__file__).resolve().parents[2] / "megatron_opd"
# Names of the stand-in's own that the real one need not have: how it rounds, and what its tests look at.
OWN = {
    "transformer_engine.pytorch.fp8": {"E4M3_MAX", "Scale", "rounded"},
    "transformer_engine.pytorch.tensor": {"parameter"},
}
OWN_STATE = {"enabled", "recipe", "parameters", "keep_initial", "depth", "scales", "entered", "is_delayed"}

FIRST = {"query_layer", "key_layer", "value_layer"}  # optional since 2.14; nothing leaves them out

each = pytest.mark.parametrize("real", REAL, ids=lambda sources: sources.version)
pytestmark = pytest.mark.skipif(
    not REAL, reason=f"no Transformer Engine sources for megatron-core {installed('megatron-core')}: make install-test"
)


def modules(sources: Sources) -> list[str]:
    return sorted(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources.files)


def defined(sources: Sources, module: str) -> dict[str, ast.AST]:
    """Public classes and functions that a module itself defines, and what it assigns."""
    found: dict[str, ast.AST] = {}
    for node in sources.tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def differs(ours: Signature, theirs: Signature) -> str | None:
    """How a call that the stand-in takes would fail with the real one, or the other way round."""
    if extra := [name for name in ours.names if name not in theirs.names and not theirs.any_keyword]:
        return f"the real one has no {extra}"
    if demanded := ours.required - theirs.required - FIRST:
        return f"the real one does not demand {sorted(demanded)}"
    order = [name for name in theirs.names if name in ours.names]
    if order != [name for name in ours.names if name in theirs.names]:
        return f"the real one's order is {order}"
    return None


def differences(real: Sources) -> list[str]:
    found = []
    for module in modules(STANDS_IN):
        for name, node in defined(STANDS_IN, module).items():
            if name in OWN.get(module, ()):
                continue
            place = real.find(module, name)
            if place is None:
                found.append(f"{module}.{name} is not there")
            elif isinstance(node, ast.ClassDef) and isinstance(place[1], ast.ClassDef):
                found += class_differences(real, f"{module}.{name}", node, place)
            elif isinstance(node, ast.FunctionDef) and isinstance(place[1], ast.FunctionDef):
                if how := differs(signature(node, method=False), signature(place[1], method=False)):
                    found.append(f"{module}.{name}: {how}")
    return found


def class_differences(real: Sources, name: str, node: ast.ClassDef, place: tuple[str, ast.ClassDef]) -> list[str]:
    found, members = [], real.members(*place)
    for part in node.body:
        names = [part.name] if isinstance(part, ast.FunctionDef) else []
        if isinstance(part, ast.Assign):
            names = [target.id for target in part.targets if isinstance(target, ast.Name)]
        for member in names:
            if member in OWN_STATE or (member.startswith("_") and member != "__init__"):
                continue
            if member not in members and member != "__init__":
                found.append(f"{name}.{member} is not there")
            elif isinstance(part, ast.FunctionDef) and member in ("__init__", "forward"):
                theirs = (
                    real.takes(place[0], place[1].name)
                    if member == "__init__"
                    else signature(members[member], method=True)
                )
                if how := differs(signature(part, method=True), theirs):
                    found.append(f"{name}.{member}: {how}")
    return found


@each
def test_the_stand_in_has_nothing_that_the_real_one_lacks(real: Sources) -> None:
    assert not differences(real)


def test_a_difference_would_be_found() -> None:
    real = REAL[0]
    files = dict(STANDS_IN.files)
    place = "transformer_engine/pytorch/__init__.py"
    broken = {
        "normalized_shape=None": "normalized_shape",  # demanded
        "def forward(self, inp: Tensor, m_splits: list[int]": "def forward(self, m_splits: list[int], inp: Tensor",
        "class GroupedLinear(": "class ManyLinear(",
    }
    for before, after in broken.items():
        assert before in files[place], before
        STANDS_IN.files[place] = files[place].replace(before, after)
        STANDS_IN._trees.clear()
        try:
            assert differences(real), after
        finally:
            STANDS_IN.files[place] = files[place]
            STANDS_IN._trees.clear()


def megatron(name: str) -> ast.Module:
    spec = find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    return ast.parse(Path(list(spec.submodule_search_locations)[0], name).read_text())


def dotted(node: ast.AST) -> str:
    """`te.pytorch.Linear` as transformer_engine.pytorch.Linear; empty for what is not a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    parts.insert(0, {"te": "transformer_engine"}.get(node.id, node.id) if isinstance(node, ast.Name) else "")
    return ".".join(parts)


def constructor_calls() -> dict[str, set[str]]:
    """Class of Transformer Engine -> keywords that Megatron-Core always passes to its constructor."""
    found: dict[str, set[str]] = {}

    def add(name: str, call: ast.Call) -> None:
        if name.startswith("transformer_engine.") and call.keywords:
            found.setdefault(name, set()).update(k.arg for k in call.keywords if k.arg)

    for file in ("extensions/transformer_engine.py", "fp8_utils.py"):
        for node in ast.walk(megatron(file)):
            if isinstance(node, ast.ClassDef):
                for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
                    if ast.unparse(call.func) == "super().__init__":
                        for base in node.bases:
                            add(dotted(base), call)
            if isinstance(node, ast.Call):
                add(dotted(node.func), node)
                if ast.unparse(node.func) == "norm_module":
                    add("transformer_engine.pytorch.RMSNorm", node)
    return {name: keywords for name, keywords in found.items() if ".ops." not in name and "autocast" not in name}


def test_the_calls_of_megatron_core_are_found() -> None:
    found = constructor_calls()
    assert {"Linear", "LayerNormLinear", "DotProductAttention", "RMSNorm", "GroupedLinear"} <= {
        name.split(".")[-1] for name in found
    }
    assert "in_features" in found["transformer_engine.pytorch.Linear"]
    assert "transformer_engine.common.recipe.Float8CurrentScaling" in found


@each
def test_transformer_engine_takes_what_megatron_core_passes(real: Sources) -> None:
    wrong = []
    for name, keywords in constructor_calls().items():
        module, _, cls = name.rpartition(".")
        for sources in (real, STANDS_IN):
            if sources.find(module, cls) is None:
                if sources is real:
                    wrong.append(f"{name} is not there")
                continue
            takes = sources.takes(module, cls)
            if not takes.any_keyword and (unknown := keywords - set(takes.names)):
                wrong.append(f"{sources.version}: {name} does not take {sorted(unknown)}")
            if missing := takes.required - keywords - _POSITIONAL.get(cls, set()):
                wrong.append(f"{sources.version}: {name} also demands {sorted(missing)}")
    assert not wrong


# Constructor arguments that Megatron-Core gives by position, or in a dictionary that it fills on conditions.
_POSITIONAL = {"DotProductAttention": {"num_attention_heads", "kv_channels"}}
# What this package asks of Transformer Engine's modules and parameters.
ASKED = (
    "_fp8_workspaces",
    "fuse_wgrad_accumulation",
    "get_extra_state",
    "set_extra_state",
    "save_original_input",
    "is_first_microbatch",
    "get_high_precision_init_val",
    "clear_high_precision_init_val",
    "dequantize",
    "preserve_high_precision_init_val",
    "QuantizedTensor",
    "RMSNorm",
    "layer_norm_weight",
)


@each
def test_what_this_package_asks_for_is_there(real: Sources) -> None:
    assert not [word for word in ASKED if word not in real.words]
    for name in ("fp8_autocast", "fp8_model_init"):
        assert real.find("transformer_engine.pytorch.fp8", name) is not None
