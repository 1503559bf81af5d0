"""Transformer Engine's place taken by `tests/te_stand_in`, in processes of their own.

    results = with_stand_in(2, work, ...)        like run_distributed; in each process Megatron-Core finds the stand-in

Models with `implementation: transformer_engine` are then Megatron-Core's Transformer Engine build of them, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import run_distributed

STAND_IN = Path(__file__).with_name("te_stand_in")
_in_place = False


def with_stand_in(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `work(rank, world_size, *args)` in `world_size` processes; returns what each returned."""
    sys.path.insert(0, str(STAND_IN))  # new processes inherit it
    try:
        return run_distributed(world_size, _work, work, args, start="spawn")
    finally:
        sys.path.remove(str(STAND_IN))


def _work(rank: int, world_size: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not _in_place:
        _put_in_place()
    return work(rank, world_size, *args)


def _put_in_place() -> None:
    """Once per process: every module that asks which build to make hears what the config says."""
    global _in_place
    import megatron.core  # its modules import each other: first the whole
    from megatron.core.extensions.transformer_engine import HAVE_TE

    import megatron_opd.commands.precision_shift  # noqa: F401 -- loads every module that asks which build to make
    from megatron_opd.compat.cpu_platform import apply_cpu_platform
    from megatron_opd.models import build, specs

    assert HAVE_TE, megatron.core.__file__
    apply_cpu_platform()
    asked = specs.use_transformer_engine
    own = [module for name, module in sys.modules.items() if name.startswith("megatron_opd.")]
    for module in [m for m in own if getattr(m, "use_transformer_engine", None) is asked]:
        module.use_transformer_engine = lambda name, model, cpu: model.implementation == "transformer_engine"
    overrides = build._config_overrides
    # as on a GPU: layers are made on the current device
    build._config_overrides = lambda *values: overrides(*values) | {"use_cpu_initialization": False}
    _in_place = True
