"""Losses by name: those of the package, listed in `plugins.LOSSES`, and MODULE:NAME for one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_opd.errors import ConfigError
from megatron_opd.losses.base import Loss
from megatron_opd.plugins import LOSSES, build_part


def get_loss(kind: str, parameters: Mapping[str, Any] | None = None) -> Loss:
    """The loss called `kind` with its own parameters.

    Raises ConfigError where the name stands for no loss, or the loss does not take or refuses the parameters.
    """
    table = {name: entry.target for name, entry in LOSSES.items()}
    loss = build_part("loss.kind", kind, table, (), parameters or {}, "loss.options")
    if not isinstance(loss, Loss):
        raise ConfigError(f"loss.kind: {kind} is no subclass of megatron_opd.losses.Loss")
    return loss
