"""Starts torchrun on one node; srun runs one of these per node:

    srun python slurm/launch.py --log-dir DIR train CONFIG [key=value ...]

Beside what `megatron_opd.runtime.launch` does (stop signals go to the ranks, their exit code comes back) it
- checks the config before anything starts, and lets the first node save what the run is made of (snapshot.py);
- detects the GPUs, or takes CPUs and gloo where there are none, and the interface that reaches the first node;
- leaves the exit code in LOG_DIR/exit.NODE.

Environment: FIRST_NODE and PORT (rendezvous), NPROC_PER_NODE (default: the GPUs, or 1), EXIT_GRACE_S (how long the
other ranks of a node may go on when one has ended, default 60), and Slurm's own.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


def main() -> int:
    parser = argparse.ArgumentParser(prog="slurm/launch.py", description=__doc__.split("\n")[0])
    parser.add_argument("--log-dir", type=Path, required=True, help="of this start of this job")
    parser.add_argument("command", choices=["train", "eval"])
    parser.add_argument("config")
    options, rest = parser.parse_known_args()
    code = launch(options.log_dir, options.command, options.config, rest)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    (options.log_dir / f"exit.{node}").write_text(f"{code}\n")
    print(f"launch: node {node} ended with exit code {code}", flush=True)
    return code


def launch(log_dir: Path, command: str, config: str, rest: list[str]) -> int:
    """Runs torchrun to its end; returns the ranks' exit code."""
    from megatron_opd.config import ConfigError, dump_config, load_config
    from megatron_opd.runtime.launch import set_threads, torchrun

    try:
        resolved = load_config(config, [x for x in rest if "=" in x and not x.startswith("-")])
    except ConfigError as error:
        print(f"megatron-opd: {error}", file=sys.stderr)
        return 2
    node, nodes = int(os.environ.get("SLURM_NODEID", "0")), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    first = os.environ.get("FIRST_NODE", "127.0.0.1")
    if node == 0:
        from snapshot import save_snapshot

        save_snapshot(log_dir, dump_config(resolved), [command, config, *rest])
    gpus = gpu_count()
    processes = int(os.environ.get("NPROC_PER_NODE") or 0) or gpus or 1
    interface = interface_towards(first)
    if interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    if not gpus:
        set_threads(processes)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}]: "
    print(
        f"launch: {socket.gethostname()}, node {node} of {nodes}, {processes} processes, {gpus} GPUs, "
        f"interface {os.environ.get('GLOO_SOCKET_IFNAME')}, rendezvous {first}",
        flush=True,
    )
    return torchrun(
        [
            f"--nnodes={nodes}",
            f"--nproc-per-node={processes}",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={first}:{os.environ.get('PORT', '29400')}",
            f"--rdzv-id={os.environ.get('SLURM_JOB_ID', '0')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
            f"--rdzv-conf=is_host={str(node == 0).lower()},join_timeout=300",
            f"--log-dir={log_dir / 'ranks'}",
            "--tee=3",
            f"--shutdown-timeout={os.environ.get('EXIT_GRACE_S', '60')}",
            "-m",
            "megatron_opd.cli",
            command,
            config,
            *rest,
        ]
    )


def gpu_count() -> int:
    """GPUs that this job may use."""
    import torch

    return torch.cuda.device_count()


def interface_towards(host: str) -> str | None:
    """Name of the network interface that `host` is reached by (on `host` itself: that holds its address)."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(host), 9))
            address = probe.getsockname()[0]
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(e.family == socket.AF_INET and e.address == address for e in entries):
            return None if name == "lo" else name
    return None


if __name__ == "__main__":  # processes that Megatron-Core's checkpoint writer spawns import the main module
    sys.exit(main())
