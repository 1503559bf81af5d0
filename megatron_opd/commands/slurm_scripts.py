"""`megatron-opd slurm write DIR`: job scripts and recipes to start from, as they come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import megatron_opd
from megatron_opd.errors import InputError, describe

FOLDERS = ("slurm", "examples/qwen3")


def shipped() -> Path:
    """Where the package's job scripts and recipes lie: inside it where a wheel was installed, else in its checkout."""
    package = Path(megatron_opd.__file__).parent
    for root in (package / "shipped", package.parent):
        if (root / "slurm" / "train_qwen3.sh").is_file():
            return root
    raise InputError(f"{package}: came without its job scripts; install megatron_opd again")


def write_slurm(folder: str, force: bool = False) -> None:
    """Copies them into DIR/slurm and DIR/examples. Raises InputError where files are there already, unless `force`."""
    root, target = shipped(), Path(folder)
    files = [file for name in FOLDERS for file in sorted((root / name).iterdir()) if file.is_file()]
    there = [target / file.relative_to(root) for file in files]
    if not force and (taken := [path for path in there if path.exists()]):
        raise InputError(f"{taken[0]}: is there already; give --force to replace these files, or another folder")
    try:
        for file, path in zip(files, there, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                path.unlink()
            shutil.copyfile(file, path)
            path.chmod(0o755 if path.suffix in (".sh", ".py") else 0o644)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {describe(error)}") from error
    script = target / "slurm" / "train_qwen3.sh"
    print(f"{target}: {len(files)} files. Next: sbatch {script}; its head says what it reads")
