"""Recipes: how FP8 scales are found."""

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


@dataclass(repr=False)
class Recipe:
    fp8_format: Format = Format.HYBRID

    @property
    def is_delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


class DelayedScaling(Recipe):
    def __init__(self, margin=0, fp8_format=Format.HYBRID, amax_history_len=1, amax_compute_algo="max", **_) -> None:
        super().__init__(fp8_format)


class Float8CurrentScaling(Recipe):
    def __init__(self, fp8_format=Format.HYBRID, fp8_dpa=False) -> None:
        super().__init__(fp8_format)


class Float8BlockScaling(Recipe):
    def __init__(self, fp8_format=Format.E4M3, fp8_dpa=False) -> None:
        super().__init__(fp8_format)


class MXFP8BlockScaling(Recipe):
    def __init__(self, fp8_format=Format.E4M3, fp8_dpa=False) -> None:
        super().__init__(fp8_format)
