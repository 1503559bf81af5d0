"""Errors that explain themselves: the message is what the user needs, and a traceback would bury it.

Each class says which exit code a command ends with. The others (a bug, a machine that fails) keep their traceback.
"""

from __future__ import annotations

import errno


class OPDError(Exception):
    """Base of all errors that a command prints as one message. Exit code 1: it failed while running."""

    exit_code = 1


class RunError(OPDError, RuntimeError):
    """It failed while running: an engine, an evaluation, a hand-over, another rank."""


class InputError(OPDError, ValueError):
    """What the user gave (config, data, tokenizer, model files) is wrong; starting again does not help."""

    exit_code = 2


class RepeatingError(OPDError, RuntimeError):
    """The same would happen again: a job script that restarts failed runs must not restart this one."""

    exit_code = 3


class ConfigError(InputError):
    """One or more keys are wrong; the message lists all of them."""


def describe(error: BaseException) -> str:
    """One line on any error: what the system refused and what to do about a full disk; our own errors as they are."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        hint = "; free some space or write elsewhere" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}{hint}"
    if isinstance(error, OPDError):
        return str(error) or repr(error)
    return f"{type(error).__name__}: {error}"
