"""The comparison of two checkouts' runs, with packages that write given numbers in the place of checkouts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import REPOSITORY
from tests.tools import identical_metrics

CASES = ("--cases", "dp2/paper", "dp2/off")
LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 0.1, "reverse_kl": math.nan, "overlap_mean": None, "ended": {"eos": 1, "length": 3}},
    {"step": 2, "loss": 0.3, "reverse_kl": 0.25, "overlap_mean": 0.5, "ended": {"eos": 2, "length": 2}},
]
CLI = """
import json, pathlib, sys, time, yaml
LINES, KEY = json.loads({lines!r}), {key!r}
if sys.argv[1] == "keys":
    print("train." + KEY + "\\n    How many.\\neval.sets." + KEY + "\\n    How many.")
    sys.exit()
sections = [yaml.safe_load(open(sys.argv[2]))["train"]]
sections += [yaml.safe_load(text[10:])[0] for text in sys.argv if text.startswith("eval.sets=")]
if not all(KEY in section for section in sections):
    sys.exit("a key is missing: " + KEY)
(run_dir,) = [text.partition("=")[2] for text in sys.argv if text.startswith("run_dir=")]
for name in [sys.argv[i + 1] for i, text in enumerate(sys.argv) if text == "--variant"]:
    folder = pathlib.Path(run_dir, name)
    folder.mkdir(parents=True)
    lines = [json.dumps(line | dict(step_s=time.time())) + "\\n" for line in LINES[name]]
    (folder / "metrics.jsonl").write_text("".join(lines))
"""


def package(root: Path, key: str = "responses_per_prompt", **lines: list[dict[str, Any]]) -> Path:
    """A checkout whose `compare` writes these lines for a run of that name, and LINES for the others."""
    folder = root / "megatron_opd"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    written = json.dumps({"paper": LINES, "off": LINES, "evaluation": LINES} | lines)
    (folder / "cli.py").write_text(CLI.format(lines=written, key=key))
    return root


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    lines = copy.deepcopy(LINES)
    lines[step - 1] |= values
    return lines


def test_equal_runs_pass_whatever_the_times_and_the_spelling_of_a_renamed_key(tmp_path, capsys):
    before = package(tmp_path / "before", key="answers_per_prompt")
    after = package(tmp_path / "after")
    assert identical_metrics.main([str(before), str(after), *CASES, "tp2/evaluation"]) == 0
    assert capsys.readouterr().out == "3 runs, 36 numbers: identical\n"


@pytest.mark.parametrize(
    "lines, message",
    [
        (changed(2, loss=math.nextafter(0.3, 1)), "step 2: key loss: 0.3 before, 0.30000000000000004 after"),
        (changed(1, ended={"eos": 0, "length": 3}), "step 1: key ended.eos: 1 before, 0 after"),
        (changed(2, overlap_mean=None), "step 2: key overlap_mean: 0.5 before, None after"),
        (changed(1, reverse_kl=0.0), "step 1: key reverse_kl: nan before, 0.0 after"),
        (LINES[:1], "step 2: key step: 1 line before, no line after"),
        ([*LINES, LINES[1]], "step 2: key step: 1 line before, 2 lines after"),
        ([*LINES, LINES[1] | {"step": 3}], "step 3: key step: no line before, 1 line after"),
    ],
)
def test_what_differs_is_named_with_run_step_and_key(tmp_path, capsys, lines, message):
    before, after = package(tmp_path / "before"), package(tmp_path / "after", off=lines)
    assert identical_metrics.main([str(before), str(after), *CASES]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"DIFFERENT: dp2/off: {message}"
    assert last.endswith("numbers: 1 differences")


def test_keys_of_one_side_alone_are_listed_and_not_compared(tmp_path, capsys):
    more = [line | {"gradient_noise": 1.0} for line in LINES]
    less = [{key: value for key, value in line.items() if key != "loss"} for line in LINES]
    before, after = package(tmp_path / "before"), package(tmp_path / "after", off=more, paper=less)
    assert identical_metrics.main([str(before), str(after), *CASES]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        "not compared: gradient_noise: only after, in 1 run: dp2/off",
        "not compared: loss: only before, in 1 run: dp2/paper",
    ]


def test_many_differences_of_one_run_are_counted(tmp_path, capsys):
    lines = [{"step": step, "loss": 1.0} for step in range(1, 21)]
    others = [line | {"loss": 2.0} for line in lines]
    before, after = package(tmp_path / "before", off=lines), package(tmp_path / "after", off=others)
    assert identical_metrics.main([str(before), str(after), *CASES]) == 1
    assert "dp2/off: and 12 more differences" in capsys.readouterr().out


def test_a_run_that_fails_is_a_difference_and_is_not_recorded(tmp_path, capsys):
    before, after = package(tmp_path / "before"), package(tmp_path / "after")
    (after / "megatron_opd" / "cli.py").write_text('import sys\nsys.exit(sys.argv[1] != "keys" and "out of order")\n')
    assert identical_metrics.main([str(before), str(after), *CASES]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT: dp2/paper: after: exit code 1" in out and "out of order" in out
    assert identical_metrics.main(["record", str(after), str(tmp_path / "kept.json"), *CASES]) == 2
    assert "nothing was recorded: dp2/paper" in capsys.readouterr().err
    assert not (tmp_path / "kept.json").exists()


def test_kept_numbers_serve_as_the_side_before(tmp_path, capsys):
    kept = tmp_path / "kept.json"
    assert identical_metrics.main(["record", str(package(tmp_path / "before")), str(kept), *CASES]) == 0
    same, other = package(tmp_path / "same"), package(tmp_path / "other", paper=changed(1, loss=7.0))
    assert identical_metrics.main(["against", str(kept), str(same), *CASES]) == 0
    assert identical_metrics.main(["against", str(kept), str(other), *CASES]) == 1
    assert "DIFFERENT: dp2/paper: step 1: key loss: 0.1 before, 7.0 after" in capsys.readouterr().out
    values = json.loads(kept.read_text())
    values["settings"]["dp2/off"]["overrides"].append("train.lr=1")
    kept.write_text(json.dumps(values))
    assert identical_metrics.main(["against", str(kept), str(same), *CASES]) == 2
    assert "other settings or no numbers for dp2/off: record it again" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    good = package(tmp_path / "good")
    assert identical_metrics.main([str(good), str(tmp_path), *CASES]) == 2
    assert f"{tmp_path} is no checkout" in capsys.readouterr().err
    assert identical_metrics.main([str(good), str(good), "--cases", "dp3/*"]) == 2
    assert "--cases dp3/*: fits none of tp2/paper" in capsys.readouterr().err


def test_this_checkout_trains_what_the_tool_asks_for(tmp_path):
    kept = tmp_path / "kept.json"
    assert identical_metrics.main(["record", str(REPOSITORY), str(kept), "--cases", "dp2/paper"]) == 0
    (lines,) = json.loads(kept.read_text())["runs"].values()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["events_mean"] > 0 and "step_s" not in line for line in lines)
