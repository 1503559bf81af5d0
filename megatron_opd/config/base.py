"""What every section of the configuration is made of."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron_opd.plugins import is_own


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    renamed: ClassVar[dict[str, str]] = {}
    """Old names of keys, accepted and reported for one release."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for old, new in cls.renamed.items():
            if old in values:
                if new in values:
                    raise ValueError(f"{old} is the old name of {new}, and both are given; remove {old}")
                warnings.warn(
                    f"config key {old} is called {new} now; the old name goes in the next release",
                    FutureWarning,
                    stacklevel=2,
                )
                values[new] = values.pop(old)
        return values


class PathBase:
    directory = "."  # what relative paths are relative to, while a YAML file or an override is read


def absolute_path(value: Any) -> Any:
    """MODULE:FUNCTION and reasoning_gym:NAME stay as they are; a file of such a name is written ./a:b."""
    if not isinstance(value, str) or not value or is_own(value) or value.startswith("reasoning_gym:"):
        return value
    return os.path.abspath(os.path.join(PathBase.directory, os.path.expanduser(os.path.expandvars(value))))


FilePath = Annotated[str, BeforeValidator(absolute_path)]


Positive = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
