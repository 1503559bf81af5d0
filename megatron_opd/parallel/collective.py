"""Work that one rank or every rank does, whose result all ranks hear of and whose failure all ranks share.

A rank that fails alone leaves the others waiting in their next collective until the watchdog ends them. Here every
rank raises: an error of ours (`OPDError`) as the same class with the same message, so that all ranks end with one exit
code; any other as it is on the rank that failed and as `RankFailed` elsewhere, unless the caller names a class for it.

All functions are collective over `group` (None: the world) and work without a process group, as for one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_opd.errors import OPDError, RunError, describe

T = TypeVar("T")
_Failure = tuple[type[OPDError] | None, str]  # class and message; None: an error that is not ours


class RankFailed(RunError):
    """Another rank met an error; that rank's log has its traceback."""


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank in the group, and the group's size."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def is_rank_0() -> bool:
    """Whether this process speaks and writes for all."""
    return rank_and_size()[0] == 0


def all_gather(item: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `item`, pickled, in the group's rank order."""
    size = rank_and_size(group)[1]
    if size == 1:
        return [item]
    items: list[Any] = [None] * size
    dist.all_gather_object(items, item, group=group)
    return items


def from_rank_0(item: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's `item`, pickled, on every rank."""
    if rank_and_size(group)[1] == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def on_rank_0(
    work: Callable[[], T], group: dist.ProcessGroup | None = None, otherwise: type[OPDError] | None = None
) -> T:
    """Runs `work` on rank 0 of the group and returns its result, which is pickled, on every rank.

    Where it fails, every rank raises; `otherwise` is the class for an error that is not ours.
    """
    result, error = None, None
    if rank_and_size(group)[0] == 0:
        result, error = _attempt(work, otherwise)
    result, failure = from_rank_0((result, _failure(error)), group)
    _raise([failure], error)
    return result  # type: ignore[return-value]


def everywhere(
    work: Callable[[], T], group: dist.ProcessGroup | None = None, otherwise: type[OPDError] | None = None
) -> T:
    """Runs `work` on every rank and returns this rank's result; where one rank fails, all raise.

    `work` itself must not be collective in a way that makes the others wait for a rank that has failed.
    """
    result, error = _attempt(work, otherwise)
    _raise(all_gather(_failure(error), group), error)
    return result  # type: ignore[return-value]


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """`everywhere` for a block: what one rank raises inside, all ranks raise at its end."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    _raise(all_gather(_failure(error), group), error)


def _attempt(work: Callable[[], T], otherwise: type[OPDError] | None) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except OPDError as error:
        return None, error
    except Exception as error:
        if otherwise is None:
            return None, error
        wrapped = otherwise(describe(error))
        wrapped.__cause__ = error
        return None, wrapped


def _failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, OPDError):
        return type(error), str(error) or repr(error)
    return None, describe(error)


def _raise(failures: list[_Failure | None], own: Exception | None) -> None:
    """Raises this rank's own error, or the first rank's that has one."""
    if own is None:
        first = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return
        rank, (kind, message) = first
        own = kind(message) if kind is not None else RankFailed(f"rank {rank} failed: {message}")
    own.known_to_all = True  # type: ignore[attr-defined]  # so one rank can speak for all
    raise own
