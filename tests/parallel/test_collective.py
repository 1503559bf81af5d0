"""Every rank hears of a failure, whichever rank it happened on, and as the same error."""

from __future__ import annotations

import errno

import pytest
import torch.distributed as dist

from megatron_opd.config import ConfigError
from megatron_opd.errors import OPDError, RepeatingError, describe
from megatron_opd.parallel.collective import (
    RankFailed,
    all_gather,
    everywhere,
    from_rank_0,
    is_rank_0,
    on_rank_0,
    together,
)

FULL = OSError(errno.ENOSPC, "No space left on device", "/run/file")


class Refused(RepeatingError):
    """An error of ours with an exit code of its own."""


def fail_on(rank: int, failing: int, error: Exception, value: str = "done") -> str:
    if rank == failing:
        raise error
    return value


def outcome(action) -> tuple[str, str, bool]:
    """What a rank has got: the error's class and message and whether all know of it, or the result."""
    try:
        return "result", action(), False
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "known_to_all", False)


def _in_block(rank: int, failing: int, error: Exception) -> None:
    with together():
        fail_on(rank, failing, error)


def _on_ranks(rank: int, world_size: int):
    found = {
        "shared": from_rank_0(f"from {rank}"),
        "gathered": all_gather(rank * 10),
        "speaks": is_rank_0(),
        "result": outcome(lambda: on_rank_0(lambda: f"of {rank}")),
        "rank 0 refuses": outcome(lambda: on_rank_0(lambda: fail_on(rank, 0, Refused("no")))),
        "rank 0 breaks": outcome(lambda: on_rank_0(lambda: fail_on(rank, 0, KeyError("k")))),
        "rank 0 has no space": outcome(lambda: on_rank_0(lambda: fail_on(rank, 0, FULL), otherwise=Refused)),
        "all succeed": outcome(lambda: everywhere(lambda: f"own {rank}")),
        "block": outcome(lambda: _in_block(rank, 2, ConfigError("bad key"))),
    }
    for failing in (0, 2):
        refusal = Refused(f"rank {failing} refuses")
        found[f"{failing} refuses"] = outcome(lambda f=failing, e=refusal: everywhere(lambda: fail_on(rank, f, e)))
        found[f"{failing} breaks"] = outcome(lambda f=failing: everywhere(lambda: fail_on(rank, f, KeyError("k"))))
        found[f"{failing} full"] = outcome(
            lambda f=failing: everywhere(lambda: fail_on(rank, f, FULL), otherwise=Refused)
        )
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    group = pairs[rank // 2]
    found["group"] = outcome(lambda: on_rank_0(lambda: f"of {rank}", group))
    found["group fails"] = outcome(lambda: everywhere(lambda: fail_on(rank, 1, Refused("only the pair")), group))
    dist.barrier()  # nobody was left waiting in a collective
    return found


@pytest.fixture(scope="module")
def ranks():
    from tests.distributed import run_distributed

    return run_distributed(3, _on_ranks)


def test_results_reach_every_rank(ranks):
    assert [r["shared"] for r in ranks] == ["from 0"] * 3
    assert [r["gathered"] for r in ranks] == [[0, 10, 20]] * 3
    assert [r["speaks"] for r in ranks] == [True, False, False]
    assert [r["result"] for r in ranks] == [("result", "of 0", False)] * 3
    assert [r["all succeed"] for r in ranks] == [("result", f"own {rank}", False) for rank in range(3)]


def test_an_error_of_ours_is_the_same_on_every_rank(ranks):
    assert [r["rank 0 refuses"] for r in ranks] == [("Refused", "no", True)] * 3
    for failing in (0, 2):
        assert [r[f"{failing} refuses"] for r in ranks] == [("Refused", f"rank {failing} refuses", True)] * 3
    assert [r["block"] for r in ranks] == [("ConfigError", "bad key", True)] * 3


def test_a_surprise_keeps_its_kind_where_it_happened_and_is_named_elsewhere(ranks):
    for failing, key in ((0, "rank 0 breaks"), (0, "0 breaks"), (2, "2 breaks")):
        for rank, found in enumerate(ranks):
            if rank == failing:
                assert found[key] == ("KeyError", "'k'", True)
            else:
                assert found[key] == ("RankFailed", f"rank {failing} failed: KeyError: 'k'", True)


def test_the_caller_may_name_the_class_of_a_surprise(ranks):
    expected = ("Refused", "No space left on device (/run/file); free some space or write elsewhere", True)
    for key in ("rank 0 has no space", "0 full", "2 full"):
        assert [r[key] for r in ranks] == [expected] * 3


def test_a_group_s_failure_stays_in_the_group(ranks):
    assert [r["group"][1] for r in ranks] == ["of 0", "of 0", "of 2"]
    assert [r["group fails"][0] for r in ranks] == ["Refused", "Refused", "result"]


def test_without_a_process_group_it_is_one_rank():
    assert on_rank_0(lambda: 3) == 3 and everywhere(lambda: 4) == 4 and all_gather(5) == [5] and from_rank_0(6) == 6
    with pytest.raises(Refused, match="no"):
        on_rank_0(lambda: fail_on(0, 0, Refused("no")))
    with pytest.raises(KeyError), together():
        raise KeyError("k")
    with pytest.raises(Refused, match="KeyError: 'k'") as raised:
        everywhere(lambda: fail_on(0, 0, KeyError("k")), otherwise=Refused)
    assert isinstance(raised.value.__cause__, KeyError), "the traceback leads to what happened"


def test_errors_are_described_in_one_line():
    assert describe(Refused("as it is")) == "as it is"
    assert describe(ValueError("wrong")) == "ValueError: wrong"
    assert describe(PermissionError(errno.EACCES, "Permission denied", "/x")) == "Permission denied (/x)"
    assert issubclass(RankFailed, OPDError)
