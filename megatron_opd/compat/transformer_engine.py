"""Importing Transformer Engine: what can go wrong, and why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.compat.versions import VersionError, check_versions, installed, within

if TYPE_CHECKING:
    import torch

_RECORD = "compiled_with_torch.txt"
FP8_COPIES = "_fp8_workspaces"  # of its modules: FP8 copies of their parameters by name
FUSED_GRADIENT = "fuse_wgrad_accumulation"  # of its linear layers
INITIAL_VALUES = "get_high_precision_init_val"  # of its FP8 parameters, where it was asked to keep them


def import_transformer_engine() -> None:
    """Imports it: that it can be found says nothing, since its bindings fit only the torch they were compiled against.

    Raises:
        VersionError: it is missing, outside its range or cannot be imported, with the reason.
    """
    check_versions(("transformer-engine",))
    try:
        importlib.import_module("torch")  # first: it loads the CUDA libraries that Transformer Engine's look for
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise VersionError(why_not_imported(error)) from error


def why_not_imported(error: BaseException, version_of: Callable[[str], str | None] = installed) -> str:
    """An import of Transformer Engine that failed, explained."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    start = f"transformer-engine {version_of('transformer-engine')} cannot be imported: "
    if "undefined symbol" not in reason:
        return f"{start}{reason}. `make install-gpu` installs one that fits"
    have, compiled = version_of("torch"), compiled_with()
    other = f"torch {compiled}" if compiled not in (None, have) else f"another torch{_pin(have)}"
    return (
        f"{start}its bindings were compiled against {other}; torch {have} is installed ({reason}). pip compiles them "
        "apart from the environment, against the newest torch of the index, unless told --no-build-isolation. "
        "`make install-gpu` compiles them against the installed one"
    )


def _pin(have: str | None) -> str:
    """What vLLM wants, where that is not what is installed: then torch is what has to change."""
    try:
        pins = [text for text in requires("vllm") or () if text.startswith("torch==")]
    except PackageNotFoundError:
        return ""
    return f" (vLLM needs {pins[0].split(';')[0].strip()})" if pins and have and not within(have, pins[0][5:]) else ""


def compiled_with() -> str | None:
    """The torch that the bindings of Transformer Engine were compiled against, where `make install-gpu` did it."""
    try:
        return (distribution("transformer-engine-torch").read_text(_RECORD) or "").strip() or None
    except PackageNotFoundError:
        return None


def record_torch() -> None:
    """Notes beside Transformer Engine's bindings which torch they were compiled against. For `make install-gpu`."""
    import_transformer_engine()
    site = distribution("transformer-engine-torch").locate_file("")
    for directory in Path(str(site)).glob("transformer_engine_torch-*.dist-info"):
        (directory / _RECORD).write_text(f"{installed('torch')}\n", encoding="utf-8")


def drop_fp8_copies(module: torch.nn.Module) -> None:
    """Frees the FP8 copies of one module's parameters; the next pass makes them anew."""
    getattr(module, FP8_COPIES, {}).clear()


def fuse_gradient_accumulation(module: torch.nn.Module) -> bool:
    """One of its linear layers adds its gradient to `main_grad` inside the product; False for any other module."""
    if not hasattr(module, FUSED_GRADIENT):
        return False
    setattr(module, FUSED_GRADIENT, True)
    return True


def initial_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """The values, in high precision, that an FP8 parameter was made from, where it still keeps them."""
    keeps = getattr(parameter, INITIAL_VALUES, None)
    return keeps() if keeps is not None else None
