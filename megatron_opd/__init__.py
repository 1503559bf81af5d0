"""On-policy distillation at Megatron scale, with Prune-OPD."""

from megatron_opd.moved import install as _install_moved_modules

__version__ = "0.1.0"

_install_moved_modules()
