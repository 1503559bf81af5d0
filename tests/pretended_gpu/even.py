"""A verifier that accepts about half of all responses, however short, so that rewards are not all zero."""

from __future__ import annotations

from typing import Any


def even(response: str, answer: str, metadata: dict[str, Any]) -> float:
    return float(sum(response.encode()) % 2 == 0)
