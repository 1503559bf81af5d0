"""Which errors explain themselves: their message is what the user needs, and a traceback would bury it."""

from __future__ import annotations

import importlib

# Named, not imported: this module loads without torch, and an error's module is loaded wherever it was raised.
_SELF_EXPLAINING = (
    ("megatron_opd.config", "ConfigError", 2),
    ("megatron_opd.data.sources", "DataError", 2),
    ("megatron_opd.data.tokenizer", "TokenizerError", 2),
    ("megatron_opd.models.hf_files", "ModelFileError", 2),
    ("megatron_opd.evaluation.run", "EvaluationError", 1),
    ("megatron_opd.training.loop", "TrainingStopped", 3),
    ("megatron_opd.training.lock", "RunLocked", 3),
    ("megatron_opd.checkpoint.checkpointer", "CheckpointError", 3),
    ("megatron_opd.training.guard", "Requeue", 75),
    ("megatron_opd.training.probe", "HandoverError", 1),
)


def _kind(error: BaseException) -> int | None:
    for module, name, code in _SELF_EXPLAINING:
        if isinstance(error, getattr(importlib.import_module(module), name)):
            return code
    return None


def explains_itself(error: BaseException) -> bool:
    return _kind(error) is not None


def exit_code_of(error: BaseException) -> int:
    """2 for what the user gave (config, data, models), 3 for a stop that would repeat itself, 75 for a run that goes on
    when it is started again (`launch.py`), 1 for what else happened while running."""
    return _kind(error) or 1
