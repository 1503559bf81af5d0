"""The command that converts public files and checks prompts files, through its command line."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.data.prepare import main

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"What is {i}+2?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i + 2), "style": "rule"},
    }
    for i in (1, 2, 1)
]


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "dapo.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DAPO), path)
    return str(path)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_convert_writes_our_layout(tmp_path, parquet, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["convert", parquet, "--out", str(out)]) == 0
    assert lines(out)[0] == {"prompt": DAPO[0]["prompt"], "answer": "3", "source": "math_dapo"}
    assert len(lines(out)) == 3
    assert "wrote 3 prompts" in (printed := capsys.readouterr().out) and "1 duplicates kept" in printed
    assert "answer_key: answer is not in the file, took reward_model.ground_truth" in printed
    assert main(["validate", str(out)]) == 0


def test_convert_drops_duplicates_and_names_the_source(tmp_path, capsys):
    path, out = tmp_path / "hmmt.jsonl", tmp_path / "out.jsonl"
    rows = [{"problem": "1+2?", "answer": 3.0, "metadata": {"x": 1}}, {"problem": "1+2?", "answer": 3.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["convert", str(path), "--out", str(out), "--name", "hmmt", "--drop-duplicates"]) == 0
    assert lines(out) == [{"prompt": "1+2?", "answer": "3", "source": "hmmt", "metadata": {"x": 1}}]


def test_convert_keeps_what_is_there_and_leaves_nothing_half_written(tmp_path, parquet, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert main(["convert", parquet, "--out", str(out)]) == 1
    assert "exists; remove it or pass --overwrite" in capsys.readouterr().err and out.read_text() == "mine"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1", "answer": "2"}\n{"prompt": "1"}\n')
    assert main(["convert", str(bad), "--out", str(out), "--overwrite"]) == 1
    assert "bad.jsonl: line 2: key 'answer' is missing" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["convert", parquet, "--out", str(tmp_path / "no" / "x.jsonl")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["convert", parquet, "--out", str(out), "--overwrite"]) == 0 and len(lines(out)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "dapo.parquet", "out.jsonl"]


def test_validate_names_every_line_key_and_problem(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "1", "answer": "2"}\n'
        '{"prompt": "2", "answer": \n'
        '{"prompt": "", "answer": "2"}\n'
        '{"prompt": "3"}\n'
        '{"prompt": "1", "answer": "2"}\n'
        '{"prompt": "1", "answer": "4"}\n'
    )
    assert main(["validate", str(path)]) == 1
    printed = capsys.readouterr()
    problems = [line.removeprefix(f"problem: {path}: ") for line in printed.err.splitlines()]
    assert problems[0].startswith("line 2: broken JSON")
    assert problems[1:] == [
        "line 3: key 'prompt' is empty",
        "line 4: key 'answer' is missing; its keys are prompt",
        "line 6: key 'answer' is '4', for the same prompt in line 1 '2'",
    ]
    assert f"warning: {path}: line 5: key 'prompt' repeats line 1" in printed.out
    assert "5 rows, 4 problems, 1 warnings" in printed.out
    assert main(["validate", str(path), "--show", "1"]) == 1
    assert "... and 3 more" in capsys.readouterr().err


def test_validate_other_files(tmp_path, parquet, capsys):
    assert main(["validate", parquet]) == 0
    assert "took reward_model.ground_truth" in capsys.readouterr().out
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main(["validate", str(empty)]) == 1 and "the file is empty" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "none.jsonl")]) == 1 and "no such file" in capsys.readouterr().err
    (tmp_path / "broken.parquet").write_bytes(b"x" * 100)
    assert main(["validate", str(tmp_path / "broken.parquet")]) == 1
    assert "not a readable Parquet file" in capsys.readouterr().err
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1"}\n')
    assert main(["validate", str(prompts)]) == 1
    assert main(["validate", str(prompts), "--no-answers"]) == 0


def test_the_tool_runs_without_torch_and_exits_with_2_on_a_wrong_call(tmp_path, parquet):
    def run(*arguments):
        guard = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], None, '__main__')"  # noqa: E501
        command = [sys.executable, "-c", guard, str(TOOL), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])

    done = run("validate", parquet)
    assert done.returncode == 0, done.stderr
    assert run("validate", str(tmp_path / "none")).returncode == 1
    assert run("frobnicate").returncode == 2


def test_missing_answers_are_refused_by_line_or_kept_on_request(tmp_path, capsys):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "1", "answer": NaN}\n{"prompt": "2", "answer": ""}\n{"prompt": "3", "answer": 3.0}\n')
    for command in (["convert", str(path), "--out", str(out)], ["validate", str(path)]):
        assert main(command) == 1
        assert "line 1: key 'answer' is" in capsys.readouterr().err
        assert main([*command, "--no-answers"]) == 0
        assert f"2 of 3 rows have no answer; the first, {path}: line 1" in capsys.readouterr().out
    assert lines(out) == [{"prompt": "1", "source": ""}, {"prompt": "2", "source": ""}] + [
        {"prompt": "3", "answer": "3", "source": ""}
    ]


def test_what_json_cannot_hold_names_the_row(tmp_path, capsys):
    path = tmp_path / "p.parquet"
    row = {"prompt": "1", "answer": "2", "metadata": {"day": datetime.date(2024, 1, 1)}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert main(["convert", str(path), "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "row 1: its metadata cannot be written as JSON" in capsys.readouterr().err
