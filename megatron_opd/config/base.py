"""What every section of the configuration is made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_opd.plugins import (
    ENGINES,
    LOSSES,
    SIGNALS,
    TOKEN_WEIGHTINGS,
    TRACKERS,
    VERIFIERS,
    check_name,
    find_part,
    is_own,
)

LARGEST_COUNT = 2**31 - 1  # tokens, steps, megabytes: kernels and packed rows count in 32 bits
LARGEST_SEED = 2**63 - 1  # what torch's generators take
LARGEST_NUMBER = 1e30  # products of two still fit into float32, as their reciprocals do


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}
    """Old names of keys, accepted and reported for one release; a new name with a dot lies in a section of this one."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values, renamed = with_new_names(cls, values)
        for old, new in renamed.items():
            warn_of_old_name(old, new)
        return values

    @field_validator("*")
    @classmethod
    def _fits_float32(cls, value: Any) -> Any:
        if isinstance(value, float) and not abs(value) <= LARGEST_NUMBER:
            raise ValueError(f"is too large for tensors of float32; at most {LARGEST_NUMBER:g}")
        if isinstance(value, float) and 0 < abs(value) < 1 / LARGEST_NUMBER:
            raise ValueError(f"is too small for tensors of float32; at least {1 / LARGEST_NUMBER:g}, or 0")
        return value


def with_new_names(section: type[Section], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy with the section's old keys under their new names, and those that were there: old to new.

    Raises ValueError where both are given.
    """
    values, renamed = dict(values), {}
    for old, new in section.renamed.items():
        if old not in values:
            continue
        *outer, name = new.split(".")
        inside = values
        for part in outer:
            if not isinstance(inside.get(part, {}), dict):
                raise ValueError(f"{old} is the old name of {new}, and {part} is no section: {inside[part]!r}")
            inside[part] = dict(inside.get(part, {}))
            inside = inside[part]
        if name in inside:
            raise ValueError(f"{old} is the old name of {new}, and both are given; remove {old}")
        inside[name] = values.pop(old)
        renamed[old] = new
    return values, renamed


def warn_of_old_name(old: str, new: str) -> None:
    warnings.warn(
        f"config key {old} is called {new} now; the old name goes in the next release", FutureWarning, stacklevel=2
    )


def absolute_path(value: Any, directory: str = ".") -> Any:
    """A relative path, seen from `directory`; $NAME and ~ stand for what the shell would put there.

    MODULE:FUNCTION and reasoning_gym:NAME stay as they are; a file of such a name is written ./a:b.
    """
    if not isinstance(value, str) or not value or is_own(value) or value.startswith("reasoning_gym:"):
        return value
    return os.path.abspath(os.path.join(directory, os.path.expanduser(os.path.expandvars(value))))


def _absolute_path(value: Any) -> Any:
    return absolute_path(value)


def _no_empty_path(value: str) -> str:
    if not value:
        raise ValueError("is empty; name a path")
    return value


@dataclass(frozen=True)
class IsPath:
    """Mark of a key that holds a path."""


@dataclass(frozen=True)
class Names:
    """Mark of a key that names a part: those of this package, or one's own as MODULE:NAME."""

    known: tuple[str, ...]


def _part_exists(name: str, info: ValidationInfo) -> str:
    """While a config is read (`load_config`), what is named MODULE:NAME must be there; nothing is imported for it."""
    if info.context and info.context.get("find_parts") and is_own(name) and not name.startswith("reasoning_gym:"):
        find_part(name)
    return name


def _part_name(known: Collection[str]) -> Any:
    """The type of a key that names a part of the package's, one of `known`, or MODULE:NAME."""
    return Annotated[
        str,
        AfterValidator(lambda name: check_name(name, known)),
        AfterValidator(_part_exists),
        Names(tuple(known)),
    ]


FilePath = Annotated[str, BeforeValidator(_absolute_path), AfterValidator(_no_empty_path), IsPath()]
OwnPart = Annotated[str, AfterValidator(_part_exists), Names(())]
DataSource = Annotated[FilePath, AfterValidator(_part_exists)]
Positive = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]

if TYPE_CHECKING:
    EngineName = str
    LossName = str
    SignalName = str
    VerifierName = str
    TrackerName = str
    WeightingName = str
else:
    EngineName, LossName = _part_name(ENGINES), _part_name(LOSSES)
    SignalName, VerifierName = _part_name(SIGNALS), _part_name(VERIFIERS)
    WeightingName, TrackerName = _part_name(TOKEN_WEIGHTINGS), _part_name(TRACKERS)
