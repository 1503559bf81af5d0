"""What `megatron-opd keys` and the reference say of a key is what the config does with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.cli import main
from megatron_opd.config.keys import keys, reference

ROOT = Path(__file__).resolve().parents[2]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["keys", *words]) == 0
    return capsys.readouterr().out


def test_a_key_has_type_default_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    for line in (
        "train.lr  number; default 1e-06; at least 0",
        "train.steps  integer; default 203; above 0",
        "data.size  integer; default 10000; above 0, at most 10,000,000",
        "train.lr_schedule  text; default constant; constant, linear, cosine",
        "prune.signal  text; default overlap; overlap, teacher_top_p, none, MODULE:NAME",
        "student.model  path; required",
        "loss.k  integer or null; default null; above 0",
        "eval.sets  list of sections; default []",
        "rollout.vllm.mode  text; default colocate; colocate, server",
        "train.distributed_optimizer  true or false; default false",
        "data.suffix  text; default ''",
    ):
        assert f"{line}\n" in text


def test_words_choose_among_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in said(capsys, "vllm", "retries").splitlines() if not line.startswith(" ")]
    assert names == ["rollout.vllm.server_retries"]
    assert main(["keys", "no-such-word"]) == 2
    assert "no key has 'no-such-word'" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m megatron_opd.cli keys | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


def test_the_reference_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text() == reference(), "run: megatron-opd keys --markdown > docs/reference/config.md"


def test_every_key_is_in_the_reference_below_its_section() -> None:
    sections = {part.partition("\n")[0]: part for part in reference().split("\n## ")}
    for key in keys():
        place, _, name = key.path.rpartition(".")
        heading = next(title for title in sections if title.startswith(f"`{place}`" if place else "Top level"))
        assert f"\n| `{name}` |" in sections[heading]
