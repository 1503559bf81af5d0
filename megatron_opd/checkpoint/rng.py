"""The states of all random number generators of a process, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def rng_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and, on a GPU, CUDA's and Megatron-Core's generators."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _text(torch.from_numpy(np.asarray(keys).view(np.uint8).copy())), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
        state["megatron"] = {key: _text(value) for key, value in get_cuda_rng_tracker().get_states().items()}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` took; CUDA's part only where there is a GPU and it was saved."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, _bytes(keys).numpy().view(np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
        get_cuda_rng_tracker().set_states({key: _bytes(value) for key, value in state["megatron"].items()})


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
