"""Files of a run directory: what somebody has put in their place is replaced, and nothing is written through a link."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_opd.checkpoint import directory
from megatron_opd.evaluation.responses import ResponseFile
from megatron_opd.evaluation.run import _write_summary
from megatron_opd.files import remove_tree, write_whole
from megatron_opd.records.lines import METRICS, StepLines
from megatron_opd.records.reading import LOCK
from megatron_opd.rollout.vllm.files import PREFIX, TransferFiles
from megatron_opd.runtime.lock import RunLock


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a file that nothing may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text('{"step": 1}\n')
    return folder


def untouched(outside: Path) -> bool:
    return sorted(p.name for p in outside.rglob("*")) == ["precious"] and (
        (outside / "precious").read_text() == '{"step": 1}\n'
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, ["1\n", "2\n"])

    def failing():
        yield "3\n"
        raise OSError

    with pytest.raises(OSError):
        write_whole(path, failing())
    assert path.read_text() == "1\n2\n" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a", ".a.partial"])
@pytest.mark.parametrize("target", ["precious", "new"])
def test_a_link_is_replaced(tmp_path: Path, outside: Path, name: str, target: str) -> None:
    (tmp_path / name).symlink_to(outside / target)
    write_whole(tmp_path / "a", ["x"])
    assert (tmp_path / "a").read_text() == "x" and not (tmp_path / "a").is_symlink()
    assert untouched(outside)


@pytest.mark.parametrize("name", [METRICS, f".{METRICS}.partial"])
@pytest.mark.parametrize("target", ["precious", "new"])
def test_metrics_do_not_go_through_a_link(tmp_path: Path, outside: Path, name: str, target: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside / target)
    log = StepLines(run / METRICS, 2)
    log.add({"step": 2, "loss": 1.0})
    log.close()
    steps = [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()]
    assert steps == ([1, 2] if (name, target) == (METRICS, "precious") else [2])
    assert untouched(outside)


@pytest.mark.parametrize("name", ["a.jsonl", ".a.jsonl.partial"])
@pytest.mark.parametrize("target", ["precious", "new"])
def test_responses_and_summaries_do_not_go_through_a_link(
    tmp_path: Path, outside: Path, name: str, target: str
) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / name).symlink_to(outside / target)
    file = ResponseFile(folder / "a.jsonl")
    file.open({"k"})
    file.append([{"key": "k"}])
    assert file.open({"k"}) == ({"k": {"key": "k"}}, 0)
    (folder / "s.json").symlink_to(outside / target)
    _write_summary(folder / "s.json", {"accuracy": 1})
    assert untouched(outside)


def test_checkpoints_that_are_links_are_removed_and_not_what_they_point_to(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    partial, final = directory.partial_path(root, 1), directory.final_path(root, 1)
    partial.symlink_to(outside)
    assert directory.remove_partial(root) == [partial.name] and not os.path.lexists(partial)
    final.symlink_to(outside)
    partial.mkdir()
    (partial / directory.STATE).write_text("{}")
    manifest = {"model_type": "a", "dtype": "float32", "checkpoint": {"model": {}}}
    directory.seal(partial, final, manifest)
    assert not final.is_symlink() and directory.problem_of(final) == ""
    older = directory.final_path(root, 0)
    final.rename(tmp_path / "elsewhere")
    older.symlink_to(tmp_path / "elsewhere")
    final.symlink_to(tmp_path / "elsewhere")
    directory.remove_old(root, 1, 0)
    assert not os.path.lexists(older) and directory.problem_of(final) == ""
    remove_tree(final)
    assert directory.problem_of(tmp_path / "elsewhere") == "" and untouched(outside)


def test_a_state_that_is_not_the_saved_one_is_damage(tmp_path: Path) -> None:
    partial, final = directory.partial_path(tmp_path, 1), directory.final_path(tmp_path, 1)
    partial.mkdir()
    (partial / directory.STATE).write_text('{"step": 1}')
    directory.seal(partial, final, {"model_type": "a", "dtype": "float32", "checkpoint": {"model": {}}})
    assert directory.problem_of(final) == ""
    (final / directory.STATE).write_text('{"step": 2}')
    assert directory.problem_of(final) == "state.json is not the one that was saved"


def test_a_lock_that_points_to_nothing_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="a link to nothing"):
        RunLock(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", '{"boot": 1}', "[" * 100_000])
def test_a_lock_that_says_nothing_is_somebodys(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(Exception, match="running"):
        RunLock(tmp_path)


def test_what_others_have_left_where_parameters_travel_stays(tmp_path: Path, outside: Path) -> None:
    (tmp_path / f"{PREFIX}link").symlink_to(outside)
    (outside / "lock").touch()
    (tmp_path / f"{PREFIX}linked-lock").mkdir()
    (tmp_path / f"{PREFIX}linked-lock" / "lock").symlink_to(outside / "precious")
    TransferFiles(str(tmp_path), 1 << 20).close()
    (outside / "lock").unlink()
    assert untouched(outside) and (tmp_path / f"{PREFIX}linked-lock").is_dir()
