"""The configuration: one typed tree, YAML plus `a.b=c` overrides, every key documented under its definition.

Needs pydantic and PyYAML alone, so that a login node can check a config. Paths in a YAML file are relative to that
file; paths in overrides are relative to the current directory. All problems are reported at once, each with the
key's full path, the value and what would work.
"""

from megatron_opd.config.data import DataConfig, EvalConfig, EvalSetConfig
from megatron_opd.config.keys import all_keys
from megatron_opd.config.loading import dump_config, load_config, parse_config
from megatron_opd.config.models import ModelConfig, ParallelConfig, TeacherConfig
from megatron_opd.config.prune import PRESETS, BudgetConfig, PruneConfig
from megatron_opd.config.rollout import RolloutConfig, VllmConfig
from megatron_opd.config.root import DEFAULT_TEACHER, Config
from megatron_opd.config.training import CheckpointConfig, LossConfig, ScoreConfig, TrackingConfig, TrainConfig
from megatron_opd.errors import ConfigError

__all__ = [
    "DEFAULT_TEACHER",
    "PRESETS",
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "EvalSetConfig",
    "LossConfig",
    "ModelConfig",
    "ParallelConfig",
    "PruneConfig",
    "RolloutConfig",
    "ScoreConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainConfig",
    "VllmConfig",
    "all_keys",
    "dump_config",
    "load_config",
    "parse_config",
]
