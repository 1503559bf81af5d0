"""The table of a run's metrics."""

import json
import subprocess
import sys

from tests.tiny_run import REPOSITORY


def test_numbers_and_phases_of_a_run(tmp_path):
    tool = [sys.executable, str(REPOSITORY / "tools" / "metrics.py"), str(tmp_path)]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 2 and "metrics.jsonl cannot be read: No such file or directory" in done.stderr
    lines = [
        {"step": 1, "step_s": 2.0, "rollout_s": 1.0, "train_s": 0.5, "loss": 0.25, "overlap_mean": None},
        {"step": 2, "step_s": 2.0, "rollout_s": 1.5, "train_s": 0.6, "loss": 0.75, "overlap_mean": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (loss,) = [line for line in done.stdout.splitlines() if line.startswith("│ loss")]
    assert [cell.strip() for cell in loss.strip("│").split("│")] == ["loss", "0.5", "0.25", "0.75", "0.75"]
    assert "phases: 90.00% of 4.0 s" in done.stdout
