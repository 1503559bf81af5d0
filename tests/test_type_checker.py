"""The type checker over the whole package, and the length of its files."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 420  # lines of a file


def test_no_file_is_exempt():
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    exempt = [part["module"] for part in overrides if part.get("ignore_errors") or part.get("follow_imports") == "skip"]
    assert not exempt


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the libraries' types are those on Python 3.11")
def test_the_package_has_no_type_errors():
    """Beside `make lint`, whose cache it uses."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_of_the_package_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "megatron_opd").rglob("*.py")}
    assert len(lengths) > 100
    assert not {path.name: length for path, length in lengths.items() if length > LONGEST}
