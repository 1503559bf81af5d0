"""What the processes of `run_distributed` need, imported once: they are forked from a server that has it."""

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import megatron_opd.models.build  # noqa: E402, F401
import megatron_opd.rollout.megatron.engine  # noqa: E402, F401
import megatron_opd.scoring.factory  # noqa: E402, F401
import megatron_opd.training.loop  # noqa: E402, F401
import tests.layouts  # noqa: E402, F401
from megatron_opd.compat.cpu_platform import apply_cpu_platform  # noqa: E402

apply_cpu_platform()
# What is there now is never garbage: a collection in a rank takes 2 ms instead of 300, and copies no pages.
gc.collect()
gc.freeze()
