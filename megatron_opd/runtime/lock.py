"""One job per run directory.

RUN/lock.json names the job that owns the directory, and its time of change is the owner's heartbeat. It is made with
O_EXCL and replaced whole, which shared file systems keep atomic between nodes; flock is not, on many of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_opd.errors import RepeatingError
from megatron_opd.records.reading import LOCK, STALE_S

HEARTBEAT_S = 15.0


class RunLocked(RepeatingError):
    """Another job owns the run directory; the message has its job id, host and process."""


class RunLock:
    """Held by one process of a job. `lost` turns true where another job has taken the directory over."""

    def __init__(self, run_dir: str | Path) -> None:
        """Takes the lock, also from an owner that is dead. Raises RunLocked, or OSError where it cannot be written."""
        self.path = Path(run_dir, LOCK)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.identity = _identity()
        self.lost = False
        self.taken_from = ""  # what is worth telling about a previous owner
        while not self._create(self.path, json.dumps(self.identity)):
            owner = self._owner()
            if owner is None:
                continue
            reason = self._death_of(owner)
            if not reason:
                raise RunLocked(self._refusal(owner))
            self._take_over(owner, reason)
            return

    def beat(self) -> None:
        """To be called every HEARTBEAT_S."""
        try:
            owner = self._owner()
            if owner is None or owner.get("token") == self.identity["token"]:
                os.utime(self.path)
            else:
                self.lost = True
        except OSError:
            return  # a file system that does not answer for a moment; the others wait STALE_S

    def release(self) -> None:
        with contextlib.suppress(OSError):
            owner = self._owner()
            if owner is not None and owner.get("token") == self.identity["token"]:
                self.path.unlink()

    def _create(self, path: Path, text: str) -> bool:
        """False where it exists already."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _owner(self) -> dict[str, Any] | None:
        """None where there is no lock; an empty one where it is not readable (its owner is just writing it)."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, "it is a link to nothing; remove it", str(self.path)) from None
            return None
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) and all(key in owner for key in self.identity) else {}

    def _death_of(self, owner: dict[str, Any]) -> str:
        """Why the owner cannot be running any more; empty where it may."""
        mine = self.identity
        if owner.get("job") and owner["job"] == mine["job"] and owner.get("restart") != mine["restart"]:
            return f"job {mine['job']} has been requeued"
        if owner and all(owner.get(key) == mine[key] for key in ("boot", "pid_namespace")):
            alive = _started(owner["pid"]) == owner["process_started"]
            return "" if alive else f"process {owner['pid']} on {owner['host']} is gone"
        silent = self._silent_s()
        return f"no heartbeat for {silent:.0f} s" if silent > STALE_S else ""

    def _silent_s(self) -> float:
        """Seconds since the last heartbeat by the file system's own clock, which all nodes share."""
        probe = self.path.with_name(f".{LOCK}.{self.identity['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, owner: dict[str, Any], reason: str) -> None:
        """Replaces a dead owner's lock; of several that try at once, one succeeds."""
        gate = self.path.with_name(f"{LOCK}.takeover")
        while not self._create(gate, ""):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - gate.stat().st_mtime > 60:  # its maker died on the way
                    gate.unlink()
            time.sleep(0.2)
        try:
            now = self._owner()
            if now is not None and now.get("token") != owner.get("token"):
                raise RunLocked(self._refusal(now))
            fresh = self.path.with_name(f".{LOCK}.{self.identity['token']}")
            fresh.write_text(json.dumps(self.identity), encoding="utf-8")
            os.replace(fresh, self.path)
        finally:
            gate.unlink(missing_ok=True)
        self.taken_from = f"took over the run directory from {_name(owner)}: {reason}"

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"{self.path.parent} belongs to {_name(owner)}, which is still running. End it, or choose another run_dir. "
            f"(If its machine has died, the lock ends {STALE_S:.0f} s after the last heartbeat; then start again.)"
        )


def _identity() -> dict[str, Any]:
    return {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "process_started": _started(os.getpid()),
        # The same pid means the same process only within one boot and one pid namespace (containers have their own).
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": uuid.uuid4().hex,
    }


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "a job that is just starting"
    job = f"Slurm job {owner['job']}" if owner.get("job") else "a process outside Slurm"
    return f"{job} (host {owner.get('host')}, process {owner.get('pid')}, since {owner.get('since')})"


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty where there is none, or only its remains."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
