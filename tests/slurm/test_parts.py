"""What a run saves about itself holds no secrets; preflight names the node that is to blame."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.preflight import Report, disk_problem, judge_reports, pairs, slow_links, slow_nodes
from tests.slurm.harness import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "slurm"))
from snapshot import redacted  # noqa: E402


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "db_password", "AWS_SECRET_ACCESS", "MY_CREDENTIALS"])
def test_secrets_by_name(name: str) -> None:
    assert redacted({name: "abc"}) == {name: "(redacted)"}


def test_secrets_by_form() -> None:
    got = redacted({"PROXY": "http://me:pw@host:80", "X": "use hf_abcdefghijklmnop", "PATH": "/usr/bin", "N": "a\nb"})
    assert got == {"PROXY": "http://(redacted)host:80", "X": "use (redacted)", "PATH": "/usr/bin", "N": "a\\nb"}


@pytest.mark.parametrize("count", range(2, 10))
def test_pairs_are_disjoint_and_reach_every_node(count: int) -> None:
    rounds = pairs(count)
    for together in rounds:
        members = [node for pair in together for node in pair]
        assert len(members) == len(set(members))
    meetings = [node for together in rounds for pair in together for node in pair]
    assert all(meetings.count(node) == (1 if count == 2 else 2) for node in range(count))


def test_the_slow_node_is_the_one_whose_pairs_are_all_slow() -> None:
    rates = {(0, 1): 10.0, (1, 2): 0.1, (2, 3): 0.2, (3, 0): 9.0}
    assert [(pair[0], sure) for pair, _, sure in slow_nodes(rates, 1.0)] == [(2, True), (2, True)]
    assert slow_nodes(rates, 0.05) == []


def test_a_slow_link_is_reported_with_its_limit() -> None:
    nodes, one_bad = ["a", "b", "c"], {(0, 1): 4.0, (1, 2): 5.0, (2, 0): 40.0}
    assert slow_links(nodes, one_bad, least=1.0, share=0.0) == []
    lines = slow_links(nodes, one_bad, least=1.0, share=0.25)
    assert [line.split(" reaches")[0] for line in lines] == ["b: all-reduce with a", "b: all-reduce with c"]
    assert lines[0].endswith("reaches 4 GB/s, the limit is 10 GB/s (MIN_SHARE of the fastest pair's 40)")
    (line,) = slow_links(["a", "b"], {(0, 1): 0.5}, least=1.0, share=0.25)
    assert line == "a or b: all-reduce between them reaches 0.5 GB/s, the limit is 1 GB/s (MIN_GBPS)"


def test_disk(tmp_path: Path) -> None:
    assert disk_problem(tmp_path, 0.0) is None
    assert "the limit is 1e+09 GiB (MIN_FREE_GB)" in str(disk_problem(tmp_path, 1e9))
    (tmp_path / "file").touch()
    assert "not writable" in str(disk_problem(tmp_path / "file", 0.0))


class Store(dict):
    def wait(self, keys, timeout):
        if keys[0] not in self:
            raise RuntimeError("timeout")

    def get(self, key):
        return self[key]


def test_reports_name_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    def report(node: str, gpus: int, *problems: str) -> str:
        return json.dumps(vars(Report(node, gpus, list(problems))))

    store = Store({"report/0": report("a", 8), "report/1": report("b", 7), "report/2": report("c", 8, "disk broken")})
    problems, gpus = judge_reports(store, ["a", "b", "c", "d"], 0.1)
    assert gpus == 8
    assert sorted(p.split(":")[0] for p in problems) == ["b", "c", "d"]


def test_missing_node_stops_all(tmp_path: Path) -> None:
    """Two nodes, of which one never comes: the first one says which, and ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable, "-m", "megatron_opd.preflight", "--nodes", "here,gone", "--rank", "0", "--port", str(port),
            "--address", "127.0.0.1", "--directory", str(tmp_path), "--min-free-gb", "0", "--wait-s", "1",
        ],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 1
    assert "bad node gone: did not come" in done.stdout
