"""Several runs in one set of processes, a step of each in turns: what is compared meets the same machine.

The speed of a machine drifts by more than the differences that are worth knowing. Runs that take turns share the drift,
and they share what a start costs.
"""

from __future__ import annotations

from megatron_opd.config import Config, ConfigError
from megatron_opd.runtime.ending import ending
from megatron_opd.training.loop import advance, begin
from megatron_opd.training.run import Run


def compare(configs: dict[str, Config]) -> None:
    """Trains every named run to its last step, always the one that has the fewest. Collective.

    Each run is what `train` makes of its config: its own models, optimizer, data, directory and checkpoints. Their
    models are in memory all at once.

    Raises:
        ConfigError: two runs share a directory, or a run needs something that a process has once.
    """
    seen: dict[str, str] = {}
    for name, config in configs.items():
        other = seen.setdefault(config.run_dir, name)
        if other != name:
            raise ConfigError(f"run_dir: the runs {other} and {name} would both write to {config.run_dir}")
        if config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocate":
            raise ConfigError(
                f"rollout.vllm.mode: colocate in the run {name}: a process holds one vLLM engine; use mode: server or "
                "engine: megatron to compare runs in turns"
            )
    runs: list[Run] = []

    def close() -> None:
        for run in reversed(runs):  # each has put its signal handlers over those of the one before
            run.close()

    with ending(close):
        for name, config in configs.items():
            runs.append(Run(config, name))
        for run in runs:
            begin(run)
        while unfinished := [run for run in runs if not run.finished]:
            advance(min(unfinished, key=lambda run: run.step))
