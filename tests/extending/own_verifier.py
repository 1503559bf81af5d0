"""A verifier: the right sum counts in full, a number that could be one a little, anything else nothing."""

from __future__ import annotations

import re
from typing import Any


def number(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """A score from 0 to 1. `answer` and `metadata` are the prompt's."""
    found = re.search(r"\d+", response)
    if found is None:
        return 0.0
    if found[0] == answer:
        return 1.0
    return 0.25 if int(found[0]) <= metadata["largest"] else 0.0
