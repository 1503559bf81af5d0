"""Versions outside the table, a Transformer Engine that cannot be imported: one message, with what works."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_opd.compat.versions import NEEDED, SUPPORTED, VersionError, check_versions, installed, supported, within

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "python": "3.12.1",
    "torch": "2.13.0+cpu",
    "megatron-core": "0.19.2",
    "mbridge": "0.15.1",
    "transformers": "5.19.0",
    "transformer-engine": "2.20.2",
    "vllm": "0.32.0",
}


def check(*packages: str, **other: str | None) -> str:
    """The message, or nothing where all versions fit."""
    versions = GOOD | {name.replace("_", "-"): version for name, version in other.items()}
    try:
        check_versions(packages or NEEDED, versions.get)
    except VersionError as error:
        return str(error)
    return ""


def test_what_is_supported_passes() -> None:
    assert check(*GOOD.keys() - {"python"}) == ""
    for python, megatron, torch in (
        ("3.11.7", "0.16.1", "2.13.0"),
        ("3.13.0", "0.17.0", "2.15.0"),
        ("3.12.9", "0.18.2", "2.11.0"),
    ):
        assert check(python=python, megatron_core=megatron, torch=torch) == ""
    assert check(torch="2.11.0a0+b4e4ee8") == "", "NVIDIA's containers call their build of a release a pre-release"


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("python", "3.10.13"),
        ("python", "3.14.0"),
        ("torch", "2.10.0"),
        ("torch", "2.16.0"),
        ("megatron-core", "0.15.3"),
        ("megatron-core", "0.20.0"),
        ("mbridge", "0.16.0"),
        ("transformers", "5.20.0"),
        ("vllm", "0.31.0"),
        ("vllm", "0.34.0"),
        ("transformer-engine", "2.21.0"),
    ],
)
def test_what_is_outside_is_named_with_its_range(package: str, version: str) -> None:
    message = check(*NEEDED, "vllm", "transformer-engine", **{package: version})
    assert f"{package} {version} is installed; {SUPPORTED[package]} is supported" in message
    assert message.count("is installed") == 1


def test_all_that_is_wrong_is_named_at_once() -> None:
    message = check(torch="2.9.0", megatron_core=None)
    assert "torch 2.9.0" in message and "megatron-core is not installed; >=0.16.1,<0.20 is needed" in message


def test_transformer_engine_follows_megatron_core() -> None:
    assert check("transformer-engine", megatron_core="0.16.1", transformer_engine="2.11.0") == ""
    message = check("transformer-engine", megatron_core="0.16.1", transformer_engine="2.12.0")
    assert "transformer-engine 2.12.0 is installed; >=2.9,<2.12 is supported beside megatron-core 0.16.1" in message


def test_this_environment_is_supported() -> None:
    check_versions()


def setup_arguments() -> dict[str, list[str]]:
    """What setup.py hands to setuptools."""
    code = """
import json, setuptools
setuptools.setup = lambda **given: print(json.dumps([given["install_requires"], given["extras_require"]]))
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    required, extras = json.loads(done.stdout)
    return {"": required, **extras}


def test_setup_takes_its_bounds_from_the_table() -> None:
    asked = setup_arguments()
    found = [Requirement(text) for text in asked[""]]
    for package in NEEDED:
        for python, version, fits in (("3.11", "0.16.1", True), ("3.11", "0.17.0", False), ("3.12", "0.19.2", True)):
            here = [
                r
                for r in found
                if r.name == package and (not r.marker or r.marker.evaluate({"python_version": python}))
            ]
            assert len(here) == 1, package
            assert set(SUPPORTED[package].split(",")) <= set(str(here[0].specifier).split(","))
            if package == "megatron-core":
                assert (version in here[0].specifier) is fits
    assert asked["gpu"] == ["vllm" + SUPPORTED["vllm"]], "pip cannot compile Transformer Engine against the right torch"


def test_the_lock_files_are_within_the_table() -> None:
    names = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    assert names >= {"cpu-py311", "cpu-py312", "cpu-py313", "gpu-cu13-py312", "gpu-cu13-py312-compiled"}
    for name in sorted(names):
        versions = {}
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()[1:]:
            pin, _, digest = line.partition(" --hash=sha256:")
            requirement = Requirement(pin)
            assert len(digest) == 64 and str(requirement.specifier).startswith("=="), line
            versions[requirement.name] = str(requirement.specifier)[2:]
        if name.endswith("-compiled"):
            assert list(versions) == ["transformer-engine-torch"]
            continue
        assert set(NEEDED) <= set(versions), name
        for package in set(versions) & set(SUPPORTED):
            assert within(versions[package], supported(package, versions.get)), (name, package, versions[package])
        if name.startswith("cpu-py311"):  # nvidia-ml-py asks the driver, for W&B and others; it has no CUDA
            assert not [package for package in versions if package.startswith("nvidia-") and package != "nvidia-ml-py"]


def fake_package(site: Path, name: str, version: str, **files: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / f"{file}.txt").write_text(text)


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess:
    """In a process that finds the packages of `site` before those that are installed."""
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


IMPORT = "from megatron_opd.compat.transformer_engine import import_transformer_engine as f; f()"


def test_bindings_for_another_torch_are_explained(tmp_path: Path) -> None:
    fake_package(tmp_path, "transformer-engine", "2.11.0")
    fake_package(tmp_path, "transformer-engine-torch", "2.11.0", compiled_with_torch="2.15.0\n")
    module = tmp_path / "transformer_engine" / "pytorch"
    module.mkdir(parents=True)
    (module.parent / "__init__.py").write_text("")
    (module / "__init__.py").write_text(
        'raise ImportError("transformer_engine_torch.so: undefined symbol: _ZNK3c1010TensorImpl")'
    )
    done = python(tmp_path, "-c", IMPORT)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    for part in (
        "torch 2.15.0",
        f"torch {installed('torch')} is installed",
        "_ZNK3c1010TensorImpl",
        "make install-gpu",
    ):
        assert part in message, message
    (tmp_path / "transformer_engine_torch-2.11.0.dist-info" / "compiled_with_torch.txt").unlink()
    fake_package(tmp_path, "vllm", "0.32.0")
    with (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").open("a") as file:
        file.write("Requires-Dist: torch==2.14.0\n")
    message = python(tmp_path, "-c", IMPORT).stderr.strip().splitlines()[-1]
    assert "another torch (vLLM needs torch==2.14.0)" in message, message


def test_any_other_failure_gives_its_reason(tmp_path: Path) -> None:
    fake_package(tmp_path, "transformer-engine", "2.11.0")
    module = tmp_path / "transformer_engine"
    module.mkdir()
    (module / "__init__.py").write_text("")
    (module / "pytorch.py").write_text('raise RuntimeError("Could not find shared object file: core")')
    done = python(tmp_path, "-c", IMPORT)
    assert "cannot be imported: Could not find shared object file: core" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["train", "eval", "doctor"])
def test_commands_check_first(tmp_path: Path, command: str) -> None:
    fake_package(tmp_path, "megatron-core", "0.15.3")
    done = python(tmp_path, "-m", "megatron_opd.cli", command, "examples/tiny/close.yaml", "--nproc", "1")
    assert done.returncode == 2, done.stderr
    assert "megatron-core 0.15.3 is installed; >=0.16.1,<0.20 is supported" in done.stderr
    assert "Traceback" not in done.stderr


def imported_names() -> list[tuple[str, str, str]]:
    """(module, name, where) of everything that the package and its tools import from Megatron-Core and mbridge."""
    found = []
    for path in [*(ROOT / "megatron_opd").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("megatron", "mbridge"):
                found += [(node.module, alias.name, f"{path.relative_to(ROOT)}:{node.lineno}") for alias in node.names]
    return found


def test_every_name_that_is_imported_exists_in_the_installed_version() -> None:
    import megatron.core  # noqa: F401 -- its modules import each other: first the whole

    names = imported_names()
    assert len(names) > 20
    missing = []
    for module, name, where in names:
        owner = importlib.import_module(module)
        if not hasattr(owner, name) and importlib.util.find_spec(f"{module}.{name}") is None:
            missing.append(f"{module}.{name} ({where})")
    assert not missing
