"""Errors that explain themselves: the message is what the user needs, and a traceback would bury it.

Each class says which exit code a command ends with. The others (a bug, a machine that fails) keep their traceback.
"""

from __future__ import annotations


class OPDError(Exception):
    """Base of all errors that a command prints as one message. Exit code 1: it failed while running."""

    exit_code = 1


class InputError(OPDError, ValueError):
    """What the user gave (config, data, tokenizer, model files) is wrong; starting again does not help."""

    exit_code = 2


class RepeatingError(OPDError, RuntimeError):
    """The same would happen again: a job script that restarts failed runs must not restart this one."""

    exit_code = 3


class ConfigError(InputError):
    """One or more keys are wrong; the message lists all of them."""
