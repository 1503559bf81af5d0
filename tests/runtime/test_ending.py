"""How a rank ends that fails by surprise."""

from __future__ import annotations

import pytest

from megatron_opd.config import ConfigError
from megatron_opd.runtime.ending import ending


class Gone(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def happened(monkeypatch) -> list[str]:
    happened: list[str] = []

    def leave(code: int) -> None:
        happened.append(f"exit {code}")
        raise Gone

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return happened


def fail(error: Exception, happened: list[str]) -> None:
    with ending(lambda: happened.append("closed")):
        raise error


def test_among_gpus_its_traceback_comes_before_anything_that_could_wait(happened, capsys):
    with pytest.raises(Gone):
        fail(RuntimeError("out of memory"), happened)
    assert happened[0] == "exit 1"
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_an_error_that_all_ranks_have_closes_in_good_order(happened):
    with pytest.raises(ConfigError):
        fail(ConfigError("train.lr: ..."), happened)
    assert happened == ["closed"]


@pytest.mark.parametrize("what, value", [("get_world_size", 1), ("is_initialized", False)])
def test_a_lone_process_closes_in_good_order(happened, monkeypatch, what, value):
    monkeypatch.setattr(f"torch.distributed.{what}", lambda: value)
    with pytest.raises(RuntimeError):
        fail(RuntimeError("out of memory"), happened)
    assert happened == ["closed"]
