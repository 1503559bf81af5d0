"""Verifiers that misbehave on request; the worker process imports them by name."""

from __future__ import annotations

import os
import time


def misbehave(response: str, answer: str, metadata: dict) -> float:
    """Does what the response says."""
    if response == "hang":
        time.sleep(1000)
    if response == "spin":
        return float(9 ** (9**9) % 7)  # C code that no signal handler of Python interrupts
    if response == "raise":
        raise ZeroDivisionError("on purpose")
    if response == "die":
        os._exit(3)
    if response == "crash":
        os.abort()
    if response == "exit":
        raise SystemExit(4)
    if response == "eat memory":
        return float(len(bytearray(1 << 40)))
    if response == "print":
        print("noise" * 100_000, flush=True)
    if response == "two":
        return 2.0
    return float(response == answer)


def of_verl(response, answer, metadata):
    """Another framework's form of a score."""
    return {"score": 1.0}


def never(response, answer, metadata):
    return 0.0
