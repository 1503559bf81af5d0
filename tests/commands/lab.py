"""A place to try the commands with inputs of all kinds, in one process, and what is noted of how they end.

What a command may do: end with a code of docs/reference/commands.md, and with one message where the code is not 0. A
traceback, a hang and any other code are failures, which are gathered by where they come from.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import io
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import yaml

from tests.data.make_tokenizers import make_hugging_face
from tests.tiny_run import REPOSITORY, TinyRun

HANG_S = 300  # of one input; far more than it takes on a busy machine
CODES = {
    "train": (0, 2, 3),
    "compare": (0, 2, 3),
    "eval": (0, 2),
    "doctor": (0, 1, 2),
    "gate": (0, 1, 2),
    "convert": (0, 1),
}
CODES |= {"prepare": (0, 1, 2), "metrics": (0, 2), "keys": (0, 2)}
ONE_RANK: dict[str, Any] = {
    "student": {"parallel": {"tensor": 1, "sequence": False}},
    "teacher": {"parallel": {"pipeline": 1}},
    "train": {"steps": 1, "warmup_steps": 0},
    "prune": {"budget": {"initial": 4, "minimum": 2, "maximum": 6}},
    "eval": {
        "every": 0,
        "at_end": False,
        "sets": [{"name": "a", "prompts": "prompts.jsonl", "max_tokens": 2, "limit": 1}],
    },
}


class Failures:
    """What went wrong, one example for each place that it comes from."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = {}
        self.codes: dict[str, dict[str, int]] = {}
        self.found: dict[str, str] = {}

    def count(self, kind: str, code: object) -> None:
        self.inputs[kind] = self.inputs.get(kind, 0) + 1
        codes = self.codes.setdefault(kind, {})
        codes[str(code)] = codes.get(str(code), 0) + 1

    def report(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "codes": self.codes, "failures": sorted(self.found)}

    def add(self, kind: str, where: str, text: str) -> None:
        if f"{kind}: {where}" not in self.found:
            self.found[f"{kind}: {where}"] = text
            print(f"FAILURE {kind}: {where}\n{text}\n", file=sys.stderr, flush=True)


class Lab:
    """A tiny pair with prompts and a checkpoint to start from, and calls of the commands that leave no state behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures = folder, Failures()
        self.tiny = TinyRun(folder, **ONE_RANK)
        self.values = yaml.safe_load(self.tiny.config.read_text())
        self.tools: dict[str, Any] = {}
        self.said = ""  # by the last command
        os.chdir(folder)
        sys.path.insert(0, str(REPOSITORY / "tools"))
        assert self.call("start", "train", [str(self.tiny.config), "run_dir=first"]) == 0
        self.number = 0
        make_hugging_face(folder / "fast")
        (folder / "pieces").mkdir()
        for name in ("tokenizer.model", "config.json", "generation_config.json"):
            shutil.copy(folder / "student" / name, folder / "pieces")

    def fresh(self, name: str) -> Path:
        """A folder of this input's own, as the runs of the last one need none."""
        self.number += 1
        for old in self.folder.glob("input_*"):
            shutil.rmtree(old, ignore_errors=True)
        path = self.folder / f"input_{self.number}" / name
        path.parent.mkdir()
        return path

    def call(self, kind: str, command: str, arguments: list[str], example: str = "") -> object:
        """Runs a command as its console script does; checks how it ended."""
        said = io.StringIO()
        environment, path, directory = dict(os.environ), list(sys.path), os.getcwd()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
        code: object = None
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
        print(f"{kind}: {command} {arguments}\n{example}", file=(self.folder / "last.txt").open("w", errors="replace"))
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = self._run(command, arguments)
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            frames = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "megatron_opd" in f.filename or "/tools/" in f.filename
            ]
            frame = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
            name = Path(frame.filename).name
            text = "".join(traceback.format_exception(error)[-6:])
            self.failures.add(
                kind, f"{type(error).__name__} in {name}:{frame.name}", f"{command} {arguments}\n{example}\n{text}"
            )
            code = "traceback"
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
            sys.path[:] = path
            for number, handler in handlers.items():
                signal.signal(number, handler)
            logging.getLogger("megatron_opd").handlers.clear()
            self._leave()
        text = self.said = said.getvalue()
        if code != "traceback":
            allowed = CODES[command]
            if code not in allowed:
                last = text.strip().splitlines()[-1:] or [""]
                self.failures.add(
                    kind, f"{command} ends with {code}: {last[0][:60]}", f"{arguments}\n{example}\n{text[-1500:]}"
                )
            elif "Traceback" in text:
                self.failures.add(kind, f"{command} prints a traceback", f"{arguments}\n{example}\n{text[-1500:]}")
            elif code and not text.strip():
                self.failures.add(kind, f"{command} ends with {code} and says nothing", f"{arguments}\n{example}")
        self.failures.count(kind, code)
        return code

    def _run(self, command: str, arguments: list[str]) -> object:
        from megatron_opd.cli import main

        if command in ("train", "eval", "doctor", "compare"):
            return main([command, *arguments, "--nproc", "1"])
        if command in ("gate", "keys"):
            return main([command, *arguments])
        name = {"convert": "convert", "prepare": "prepare_data", "metrics": "metrics"}[command]
        if name not in self.tools:
            spec = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
            assert spec and spec.loader
            self.tools[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.tools[name])
        own, sys.argv = sys.argv, [name, *arguments]
        try:
            return self.tools[name].main()
        finally:
            sys.argv = own

    @staticmethod
    def _leave() -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
