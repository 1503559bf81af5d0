"""Parameters as safetensors files in shared memory or on a shared file system, for servers to load.

The directory holds the newest parameters alone. It goes when the trainer ends; what a killed trainer has left (its lock
on the directory is gone with it) is removed by the next one that uses the same parent.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.rollout.vllm.common import buckets

PREFIX = "megatron_opd-"


class TransferFiles:
    """A directory of its own under `parent`; buckets of at most `bucket_bytes`, one per file."""

    def __init__(self, parent: str, bucket_bytes: int):
        self.bucket_bytes = bucket_bytes
        Path(parent).mkdir(parents=True, exist_ok=True)
        _remove_abandoned(Path(parent))
        self._directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._directory.chmod(0o755)  # servers may run under another user
        lock = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._close = weakref.finalize(self, _remove, self._directory, lock)
        self.paths: list[str] = []

    def write(self, named: Iterator[tuple[str, Tensor]]) -> None:
        """Writes all parameters and then drops the ones before: `paths` names a whole set at any time."""
        folder = self._directory / uuid.uuid4().hex[:8]
        folder.mkdir()
        paths = []
        for number, bucket in enumerate(buckets(named, self.bucket_bytes)):
            paths.append(str(folder / f"{number:05d}.safetensors"))
            save_file(bucket, paths[-1])
        for old in {Path(path).parent for path in self.paths}:
            shutil.rmtree(old)
        self.paths = paths

    def close(self) -> None:
        """Removes the directory."""
        self._close()


def _remove(directory: Path, lock: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*/lock"):
        try:
            if path.parent.is_symlink() or path.parent.stat().st_uid != os.getuid():
                continue
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:  # its trainer lives
            pass
        finally:
            os.close(lock)
