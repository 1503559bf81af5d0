"""Parts that a config names: this package's by a short name, anybody's own as MODULE:NAME. Needs no torch.

The tables say where a short name's code lives, and what the config's checks must know of it. Nothing is imported before
it is used, so that a config can be checked on a machine without torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_opd.errors import ConfigError

OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# What a loss needs of the teacher at each response token: log-probs of the student's k candidates; the log-prob of the
# sampled token; or its logits over the whole vocabulary, which `score.mode: fused` has and `score.payload: hidden`
# rebuilds.
Reads = Literal["candidates", "sampled", "logits"]


@dataclass(frozen=True)
class LossEntry:
    """A loss of the package; `reads` and `fused_head` repeat what its class says, for those who cannot import it."""

    target: str  # MODULE:NAME
    reads: Reads
    fused_head: bool = True  # it can be computed from hidden states in chunks of tokens
    options: tuple[str, ...] = ()  # its own parameters: keys of `loss` or of `loss.options`


LOSSES = {
    "topk_reverse_kl": LossEntry("megatron_opd.losses.candidates:TopkReverseKL", "candidates"),
    "sampled_reverse_kl": LossEntry("megatron_opd.losses.candidates:SampledReverseKL", "sampled"),
    "full_reverse_kl": LossEntry("megatron_opd.losses.full_vocabulary:FullReverseKL", "logits", fused_head=False),
    "forward_kl": LossEntry("megatron_opd.losses.full_vocabulary:ForwardKL", "logits", fused_head=False),
    "generalized_jsd": LossEntry(
        "megatron_opd.losses.full_vocabulary:GeneralizedJSD", "logits", fused_head=False, options=("jsd_beta",)
    ),
}
SIGNALS = {
    "overlap": "megatron_opd.prune.signals:TopKOverlap",
    "teacher_top_p": "megatron_opd.prune.signals:TeacherNucleus",
    "none": "megatron_opd.prune.signals:NoSignal",
}
TOKEN_WEIGHTINGS = {
    "none": "",  # every response token weighs the same
    "iw": "megatron_opd.prune.token_weighting:DisagreementBefore",
    "tip": "megatron_opd.prune.token_weighting:EntropyOrDisagreement",
    "random_window": "megatron_opd.prune.token_weighting:RandomWindow",
}
ENGINES = {
    "megatron": "megatron_opd.rollout.megatron.engine:megatron_engine",
    "vllm": "megatron_opd.rollout.vllm.factory:vllm_engine",
}
TRACKERS = {
    "tensorboard": "megatron_opd.trackers.tensorboard:TensorBoard",
    "wandb": "megatron_opd.trackers.wandb:WandB",
    "mlflow": "megatron_opd.trackers.mlflow:MLflow",
    "swanlab": "megatron_opd.trackers.swanlab:SwanLab",
    "trackio": "megatron_opd.trackers.trackio:Trackio",
}
VERIFIERS = ("math", "reasoning_gym", "exact")  # evaluation/worker.py has them: its process imports nothing of ours


def is_own(name: str) -> bool:
    """Whether a name stands for something of the user's own: MODULE:NAME."""
    return bool(OWN.fullmatch(name))


def check_name(name: str, table: Collection[str]) -> str:
    """For a config's validators: the name itself, where it is in the table or of the form MODULE:NAME.

    Raises ValueError with the names there are.
    """
    if name in table or is_own(name):
        return name
    raise ValueError(f"must be one of {', '.join(table)}, or your own as MODULE:NAME")


def find_part(name: str) -> None:
    """Looks for MODULE:NAME without running the module. Raises ValueError where there is no such module, where it does
    not parse, or where it defines no such name."""
    module, _, attribute = name.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot import {module} ({error}); it must be installed or lie on PYTHONPATH") from None
    except Exception as error:  # of a package that runs as its submodule is looked for
        raise ValueError(f"cannot import {module}: {type(error).__name__}: {error}") from None
    if spec is None:
        raise ValueError(f"there is no module {module}; it must be installed or lie on PYTHONPATH")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or a folder: only importing it would tell
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{spec.origin} is not valid Python: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {spec.origin}: {error.strerror}") from None
    defined = _defined(tree.body)
    if not defined & {attribute, "*", "__getattr__"}:
        near = difflib.get_close_matches(attribute, defined, n=1)
        raise ValueError(f"{spec.origin} defines no {attribute}" + (f"; did you mean {near[0]}?" if near else ""))


def _defined(statements: list[ast.stmt]) -> set[str]:
    """Names that these statements give to their module, those under if, try, with and loops among them."""
    defined: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
    return defined


def load_part(key: str, name: str, table: Mapping[str, str]) -> Any:
    """What `name` stands for, imported. Raises ConfigError naming the config's `key` where it cannot be."""
    try:
        check_name(name, table)
    except ValueError as error:
        raise ConfigError(f"{key}: {name} {error}") from None
    module, _, attribute = table.get(name, name).partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}: {name}: cannot import {module} ({error}); it must be installed or lie on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a user's module does as it is imported
        raise ConfigError(f"{key}: {name}: importing {module} fails with {type(error).__name__}: {error}") from error
    if not hasattr(imported, attribute):
        raise ConfigError(f"{key}: {name}: {imported.__file__} has no {attribute}")
    return getattr(imported, attribute)


def bind_part(
    key: str,
    name: str,
    table: Mapping[str, str],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    options_key: str | None = None,
) -> Callable[..., Any]:
    """What `name` stands for, which can be called with as many arguments and, by keyword, with these options.

    Nothing is called: this checks a config before the arguments exist. See `build_part` for the rest.
    """
    maker = load_part(key, name, table)
    if not callable(maker):
        raise ConfigError(f"{key}: {name} is a {type(maker).__name__}, not a class")
    missing = sorted(getattr(maker, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{key}: {name} lacks {', '.join(missing)}, which it must define")
    signature = inspect.signature(maker)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        taken = list(signature.parameters)[len(arguments) :]
        raise ConfigError(
            f"{options_key or key + '_options'}: {dict(options)}: {error}; {name} takes "
            f"{', '.join(taken) or 'no options'}"
        ) from None
    return maker


def build_part(
    key: str,
    name: str,
    table: Mapping[str, str],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    options_key: str | None = None,
) -> Any:
    """Calls what `name` stands for with `arguments` and, by keyword, with the options that the config gives it.

    `options_key` is the config's key of the options, `KEY_options` where it is not given. Raises ConfigError where the
    part cannot be imported, does not take these options (the message says which it takes) or refuses their values with
    a ValueError.
    """
    maker = bind_part(key, name, table, arguments, options, options_key)
    try:
        return maker(*arguments, **options)
    except ValueError as error:
        raise ConfigError(f"{key}: {name}: {error}") from error
