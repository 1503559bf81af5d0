"""Which errors explain themselves: their message is what the user needs, and a traceback would bury it.

And how a rank ends that meets any other.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def ending(close: Callable[[], None]) -> Iterator[None]:
    """Calls `close` at the end, unless `end_at_once` has ended the process."""
    try:
        yield
    except Exception as error:
        end_at_once(error)
        raise
    finally:
        close()


def end_at_once(error: Exception) -> None:
    """Ends one of several ranks on GPUs that failed by surprise, with its traceback.

    The others wait for it in a collective. Closing engines and process groups in good order would wait for them: the
    launcher would see no dead rank, and the traceback would come after the watchdog, if ever.
    """
    import torch
    import torch.distributed as dist

    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or not torch.cuda.is_available() or explains_itself(error):
        return
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)
