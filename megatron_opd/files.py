"""Files of a run directory: whole or absent, and never written through a link.

A link to a folder is followed (checkpoints may lie on another disk). A link in the place of a file, or of a folder that
is to be removed, is what gets replaced or removed; what it points to stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Replaces the file by these lines, whole or not at all. Raises OSError."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with new_file(scratch).open("x", encoding="utf-8") as file:
            file.writelines(lines)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def new_file(path: Path) -> Path:
    """The path, where nothing lies any more. Raises OSError."""
    path.unlink(missing_ok=True)
    return path


def remove_tree(path: Path) -> None:
    """Removes a folder with all that is in it, or the link in its place; what resists stays."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
