"""Builds the rollout engine that the config names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_opd.config import Config, ConfigError
from megatron_opd.models.model import Model
from megatron_opd.plugins import ENGINES, bind_part, build_part
from megatron_opd.rollout.base import EngineSetup, RolloutEngine
from megatron_opd.rollout.limits import longest_sequence
from megatron_opd.weights.export import export_parameters


def hf_stream(student: Model, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The student's parameters as engines take them over; see `export_parameters`. Collective."""
    return export_parameters(student, config.rollout.bucket_mb << 20)


def check_engine(config: Config) -> None:
    """Before models are loaded. Raises ConfigError where the engine cannot be imported or lacks an option's name."""
    bind_part("rollout.engine", config.rollout.engine, ENGINES, (None,), config.rollout.engine_options)


def make_engine(config: Config, student: Model, eos_ids: set[int]) -> RolloutEngine:
    """Collective. Raises ConfigError where the engine is not installed, cannot be imported or refuses its options."""
    name, setup = config.rollout.engine, EngineSetup(config, student, eos_ids, longest_sequence(config))
    engine = build_part("rollout.engine", name, ENGINES, (setup,), config.rollout.engine_options)
    if not isinstance(engine, RolloutEngine):
        raise ConfigError(f"rollout.engine: {name} is no subclass of megatron_opd.rollout.base.RolloutEngine")
    return engine
