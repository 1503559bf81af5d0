"""Whatever is wrong with an input, a command ends with one message and a code of the table; see bad_inputs.py.

MEGATRON_OPD_BAD_INPUTS=2000 tries so many of each kind instead of a hundred in all, and others than each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.commands.bad_inputs import KINDS
from tests.distributed import LIMIT_S
from tests.tiny_run import REPOSITORY, child_environment

MORE = os.environ.get("MEGATRON_OPD_BAD_INPUTS")
FEW = 100


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.commands.bad_inputs", *([MORE, "--seed", "1"] if MORE else [str(FEW)])],
        cwd=REPOSITORY,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=None if MORE else LIMIT_S,
    )
    assert ended.stdout, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    report["examples"] = ended.stderr
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_one_message_with_a_code_of_the_table(report: dict[str, Any], kind: str) -> None:
    assert report["inputs"][kind] >= 0.8 * int(MORE or FEW)
    assert not [where for where in report["failures"] if where.startswith(kind)], report["examples"]
    refused = sum(times for code, times in report["codes"][kind].items() if code not in ("0", "traceback"))
    assert refused >= report["inputs"][kind] // 4, "the inputs are hardly bad"
