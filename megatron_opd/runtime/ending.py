"""How a rank ends that has met an error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_opd.errors import OPDError


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
    if alone or not torch.cuda.is_available() or isinstance(error, OPDError):
        return
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)
