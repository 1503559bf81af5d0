"""What a run saves about itself holds no secrets; preflight names the node that is to blame."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.runtime.preflight import Report, disk_problem, judge_reports, pairs, slow_links, slow_nodes
from tests.slurm.harness import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "slurm"))
from snapshot import redacted  # noqa: E402

SECRETS = """
    WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN SWANLAB_API_KEY MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN
    COMET_API_KEY OPENAI_API_KEY GITHUB_PAT GH_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
    AZURE_CLIENT_SECRET KAGGLE_KEY GOOGLE_APPLICATION_CREDENTIALS MEGATRON_OPD_VLLM_API_KEY NGC_API_KEY
    SLURM_JWT PGPASSWORD MYSQL_PWD REDIS_AUTH NETRC APIKEY DATABRICKS_TOKEN SENTRY_DSN db_password
    MY_CREDENTIALS RSYNC_PASSWORD SSH_PASSPHRASE
""".split()
PLAIN = """
    PATH PWD OLDPWD HOME MONKEY KEYBOARD TOKENIZERS_PARALLELISM AUTHOR SLURM_JOB_ID
""".split()
FORMS = """
    sk-proj-abcdefghijklmnopqrstuv ghp_abcdefghijklmnopqrstuvwxyz012345 github_pat_11ABCDEFG0abcdefghijklm
    AKIAIOSFODNN7EXAMPLE glpat-abcdefghijklmnopqrst xoxb-123456789012-abcdefghij
    eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcDEF123_- nvapi-abcdefghijklm AIzaSyA-abcdefghijklmnopqrstuvwxyz12345
    hf_abcdefghijklmnop
""".split()


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_by_name(name: str) -> None:
    assert redacted({name: "abc"}) == {name: "(redacted)"}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_secret_stays(name: str) -> None:
    assert redacted({name: "/some/value"}) == {name: "/some/value"}


@pytest.mark.parametrize("form", FORMS)
def test_secrets_in_values(form: str) -> None:
    assert redacted({"X": f"use {form}, please"}) == {"X": "use (redacted), please"}
    assert redacted({"HEADER": "Authorization: Bearer abcdefghijklmnop"}) == {
        "HEADER": "Authorization: Bearer (redacted)"
    }


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
            sys.executable,
            "-m",
            "megatron_opd.runtime.preflight",
            "--nodes",
            "here,gone",
            "--rank",
            "0",
            "--port",
            str(port),
            "--address",
            "127.0.0.1",
            "--directory",
            str(tmp_path),
            "--min-free-gb",
            "0",
            "--wait-s",
            "1",
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 1
    assert "bad node gone: did not come" in done.stdout


FAKES = {
    "scontrol": "echo n1; echo n2; echo n3",
    "srun": 'if [[ $1 == --help ]]; then echo "$SRUN_HELP"; exit; fi; printf "%s\\n" "$*" >>"$CALLS"',
    "apptainer": "exit 1",
}


def submit(folder: Path, fakes: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs train_qwen3.sh on three nodes that are not there: `fakes` stand for Slurm's commands."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in fakes.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    for name in ("student", "teacher", "data"):
        (folder / name).mkdir(exist_ok=True)
    environment = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "CALLS": str(folder / "calls"),
        "SRUN_HELP": "",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "STUDENT": str(folder / "student"),
        "TEACHER": str(folder / "teacher"),
        "RUN_DIR": str(folder / "run"),
        "PROMPTS": str(folder / "data" / "prompts.jsonl"),
    } | settings
    script = str(REPOSITORY / "slurm" / "train_qwen3.sh")
    return subprocess.run(["bash", script, "train.steps=5"], capture_output=True, text=True, env=environment)


def job_commands(folder: Path, **settings: str) -> list[str]:
    """What train_qwen3.sh gives to srun, one line a call."""
    done = submit(folder, FAKES, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "calls").read_text().splitlines()


def seen_inside(folder: Path) -> str:
    places = [REPOSITORY, folder / "run", folder / "student", folder / "teacher", folder / "data"]
    return ",".join(f"{place}:{place}" for place in [*places, REPOSITORY / "examples" / "qwen3"])


def test_in_a_container_by_pyxis(tmp_path: Path) -> None:
    help_text = "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"
    preflight, train = job_commands(
        tmp_path, CONTAINER_IMAGE="opd.sqsh", CONTAINER_MOUNTS="/scratch:/scratch", SRUN_HELP=help_text
    )
    for line in (preflight, train):
        assert f"--container-image=opd.sqsh --container-mounts={seen_inside(tmp_path)},/scratch:/scratch " in line
        assert f"--container-workdir={REPOSITORY}" in line and "apptainer" not in line
    assert "--nodes=3" in preflight and "python3 -m megatron_opd.runtime.preflight --nodes n1,n2,n3" in preflight
    assert f"--nodelist=n1,n2,n3 --output={tmp_path}/run/logs/7.0/%N.log python3 {REPOSITORY}/slurm/launch.py" in train
    assert train.endswith(f" train {REPOSITORY}/examples/qwen3/recipe.yaml run_dir={tmp_path}/run train.steps=5")


def test_in_a_container_by_apptainer(tmp_path: Path) -> None:
    preflight, train = job_commands(tmp_path, CONTAINER_IMAGE="opd.sif", PYTHON="/opt/bin/python")
    inside = f"apptainer exec --nv --bind {seen_inside(tmp_path)} --pwd {REPOSITORY} opd.sif /opt/bin/python "
    assert (
        f"{inside}-m megatron_opd.runtime.preflight" in preflight and f"{inside}{REPOSITORY}/slurm/launch.py" in train
    )
    assert "--container" not in preflight + train


def test_servers_take_the_last_nodes(tmp_path: Path) -> None:
    """Without GPUs: one server a node, at ports from VLLM_PORT on; the ranks know them by name."""
    commands = job_commands(tmp_path, VLLM_NODES="1", VLLM_PORT="9000", PREFLIGHT="0")
    gpus, servers, train = sorted(commands, key=lambda line: ("slurm/launch.py" in line, "serve.sh" in line))
    assert "--nodelist=n3" in gpus and "--nodes=1 --ntasks=1 --nodelist=n3" in servers
    assert "--nodes=2 --ntasks=2 --nodelist=n1,n2" in train
    override = 'rollout.engine=vllm rollout.vllm.mode=server rollout.vllm.servers=["http://n3:9000"] '
    assert f"{override}rollout.vllm.transfer_dir={tmp_path}/run/transfer train.steps=5" in train


ENDED = """[[ "$*" =~ --log-dir\\ ([^ ]+) ]] && logs=${BASH_REMATCH[1]} || exit 0
cat >"$logs/n1.log" <<END
[rank 0]: megatron-opd: 1 problem(s) in the config:
[rank 0]:   train: warmup_steps: 2 must be below steps: 2
[rank 0]: something else
launch: 10:00:02 rank 0 ended by exit code 2
END
echo "launch: 10:00:01 rank 1 ended by SIGKILL" >"$logs/n2.log"
echo 2 >"$logs/exit.n1"; echo 1 >"$logs/exit.n2"; exit 2"""


def test_what_ended_a_job_is_in_its_output(tmp_path: Path) -> None:
    """The rank that ended first comes first; what would happen again is not requeued."""
    done = submit(tmp_path, FAKES | {"srun": ENDED}, PREFLIGHT="0")
    assert done.returncode == 2
    told = [
        "  10:00:01 rank 1 ended by SIGKILL on n2",
        "  10:00:02 rank 0 ended by exit code 2 on n1",
        "  n3: no log: the node never started",
        "  n1: megatron-opd: 1 problem(s) in the config:",
        "  n1:   train: warmup_steps: 2 must be below steps: 2",
    ]
    assert "\n".join(told) in done.stdout and "n1: something else" not in done.stdout
    assert "running again would end the same way" in done.stdout


def test_crashes_without_progress_end_the_job(tmp_path: Path) -> None:
    """Counted from the newest checkpoint on, also where `checkpoints` is a link to another file system."""
    crash = ENDED.replace("echo 2", "echo 1").replace("exit 2", "exit 1") + "\n"
    queue = {"squeue": "echo RUNNING", "scontrol": 'echo n1; echo n2; echo n3; [[ $1 == requeue ]] && kill "$PPID"'}
    fakes = FAKES | queue | {"srun": crash.replace("exit 0", "exit 0 # answers")}
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_000002").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    for restart, step in ((0, 2), (1, 2), (2, 4), (3, 4), (4, 4)):
        (elsewhere / f"step_{step:06d}").mkdir(exist_ok=True)
        done = submit(tmp_path, fakes, PREFLIGHT="0", SLURM_RESTART_COUNT=str(restart))
        assert f"step_{step:06d}" in done.stdout
        assert ("failed 3 times in a row" in done.stdout) == (restart == 4), done.stdout
        assert ("requeueing" in done.stdout) == (restart < 4), done.stdout
