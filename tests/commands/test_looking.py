"""`runs`, `watch` and `show`: what they say of runs, also of broken ones; no text of a model steers a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_opd.cli import main
from megatron_opd.commands.show import show
from megatron_opd.commands.terminal import sparkline, visible
from megatron_opd.commands.watch import watch
from tests.report.runs import make_run
from tests.tiny_run import REPOSITORY

HOSTILE = {"5": "\x1b]0;title\x07", "6": " \u202eevil", "7": "\x9b31m", "8": "[red]markup[/red]", "3": "half \ud83d"}


def screen(**options: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system="truecolor", **options)


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_runs_has_a_line_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", 20)
    make_run(tmp_path / "deep" / "b", 6, wanted=50)
    (tmp_path / "deep" / "b" / "lock.json").write_text("{}")
    make_run(tmp_path / "c", 4, wanted=8)
    (tmp_path / "c" / "lock.json").write_text("{}")
    old = time.time() - 1000
    os.utime(tmp_path / "c" / "lock.json", (old, old))  # its owner is dead
    assert main(["runs", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line for line in lines}
    assert list(cells) == ["a", "c", "deep/b"] and head.split()[:3] == ["run", "state", "step"]
    assert "finished" in cells["a"] and "20/20" in cells["a"] and "sums 80.0%" in cells["a"]
    assert "lengths at 10" in cells["a"] and "3 min 18 s" in cells["a"] and cells["a"].rstrip().endswith("17")
    assert "running" in cells["deep/b"] and "6/50" in cells["deep/b"]
    assert "ended" in cells["c"] and "4/8" in cells["c"]
    assert head.index("state") == cells["a"].index("finished") == cells["c"].index("ended")


def test_one_picture_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 20, wanted=40)
    console = screen()
    watch(str(run), once=True, console=console)
    text = printed(console)
    for part in ("step 20 of 40", "3 min 18 s left", "sums 80.0%", "overlap", "rollout 61%", "ALARM lengths", "job 17"):
        assert part in text, part
    assert "No space left on device" in text and "effective, by" in text


def test_it_is_live_until_the_run_ends(tmp_path: Path) -> None:
    """A terminal of the system's: the picture follows the file, and the command ends with the run."""
    import pty

    run = make_run(tmp_path / "a", 3, wanted=5)
    (run / "lock.json").write_text("{}")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "megatron_opd.cli", "watch", str(run), "--every", "0.05"]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "60",
    }
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = ""

    def read_until(part: str) -> None:
        nonlocal seen
        while part not in seen:
            seen += os.read(ours, 65536).decode(errors="replace")

    try:
        read_until("step 3 of 5")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "loss": 0.25, "step_s": 1.0}) + "\n")
        read_until("step 4 of 5")
        (run / "lock.json").unlink()
        with pytest.raises(OSError):  # the other end is closed: the command has ended
            read_until("what it never says")
        assert process.wait(120) == 0
    finally:
        process.kill()
        os.close(ours)


def test_show_prints_a_response_with_its_drift(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 3)
    console = screen()
    show(str(run), step=2, number=1, console=console)
    text = printed(console)
    assert "What is 2 + 1?" in text and "reference answer: one two three" in text and "ended by length" in text
    assert "reliability spent" in text and "\x1b[38;2;" in text  # colours
    plain = Console(file=io.StringIO(), width=200)
    show(str(run), console=plain)
    assert printed(plain).count("step 3") == 4 and "\x1b" not in printed(plain)


def test_no_text_steers_the_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "\x1b[2Jrun", 3, texts=HOSTILE, prompt="\x1b[2J\u202eprompt\x00")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1, "warning": "\\u001b[2Jwarning", "accuracy": {"\\u001b[2J": 1}}\n'
    )
    for command in (show, watch):
        plain = Console(file=io.StringIO(), width=400)
        command(str(run), console=plain)
        text = printed(plain)
        assert not set(text) & set("\x1b\x07\x9b\u202e\x00") and "⟨U+202E⟩" in text and "⟨U+001B⟩" in text
    colourful = screen()
    show(str(run), console=colourful)
    assert "[red]markup[/red]" in printed(colourful).replace("\x1b", "ESC")
    assert "\x1b]0;" not in printed(colourful) and "\u202e" not in printed(colourful)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\u2066b", "a⟨U+2066⟩b"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("é😀", "é😀"),
    ],
)
def test_hidden_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3]) == "▁▃▆█" and sparkline([1, None, 1]) == "▁ ▁" and sparkline([None]) == ""
    assert sparkline(list(range(400)), 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "nowhere"],
        ["runs", "empty"],
        ["watch", "nowhere"],
        ["watch", "empty"],
        ["show", "empty"],
        ["show", "bare"],
        ["show", "run", "--step", "9"],
        ["show", "run", "--step", "1", "--response", "7"],
        ["show", "torn"],
    ],
)
def test_what_is_not_there_is_said(arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", 2)
    torn = make_run(tmp_path / "torn", 1)
    (torn / "responses" / "step_000001.json.gz").write_bytes(b"torn")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text("")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"megatron-opd: {arguments[1]}")
