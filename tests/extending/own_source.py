"""A data source: sums of two numbers, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any


def sums(size: int, seed: int) -> Iterator[dict[str, Any]]:
    """`size` rows, the same ones for the same seed: every rank calls this, and so does a resumed run."""
    draw = random.Random(seed)
    for _ in range(size):
        a, b = draw.randrange(100), draw.randrange(100)
        yield {
            "prompt": f"{a} + {b} = ",  # text, or chat messages
            "answer": str(a + b),  # the reference, for verifiers
            "source": "sums",
            "metadata": {"largest": 198},  # whatever a verifier needs besides
        }
