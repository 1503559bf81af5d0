"""What the processes of `run_distributed` need, imported once: they are forked from a server that has it."""

import os

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import megatron_opd.models.build  # noqa: E402, F401
import megatron_opd.rollout.megatron.engine  # noqa: E402, F401
import megatron_opd.scoring.score  # noqa: E402, F401
import megatron_opd.training.step  # noqa: E402, F401
import tests.layouts  # noqa: E402, F401
