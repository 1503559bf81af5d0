"""Random states and recomputation."""

from contextlib import nullcontext

from torch.utils.checkpoint import checkpoint as _checkpoint


class CudaRNGStatesTracker:
    def reset(self) -> None:
        pass

    def set_states(self, states) -> None:
        pass

    def add(self, name, seed) -> None:
        pass


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None):
    return _checkpoint(function, *args, use_reentrant=False)


def activation_recompute_forward(*args, **kwargs):
    return nullcontext()


def get_all_rng_states() -> dict:
    return {}


def is_fp8_activation_recompute_enabled() -> bool:
    return False
