"""HTTP to vLLM servers, with the standard library alone: one replica, and the pool of all of them.

A replica generates only while its policy version is the expected one. It is asked for before every response, on the
connection that the response then comes through, so that no restart fits in between, and once more by its end, where
the server states which version sampled which token.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any
from urllib.parse import urlsplit

from megatron_opd.config import ConfigError
from megatron_opd.rollout.vllm.common import RolloutError

CONNECT_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 60.0
LARGEST_REPLY = 64 << 20  # bytes; some tokens with their candidates, or the log-probs of a probe, are far less


def backoff_s(failures: int) -> float:
    """Seconds to wait after that many failures in a row: doubling, up to a minute."""
    return min(FIRST_BACKOFF_S * 2 ** max(failures - 1, 0), LAST_BACKOFF_S)


class ReplicaError(Exception):
    """This replica cannot be used now; another one may."""


class Replica:
    """One vLLM server at `url`, http://HOST:PORT."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"rollout.vllm.servers: {url!r} is not http://HOST:PORT")
        self.url = url.rstrip("/")
        self._parts, self._timeout_s = parts, timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.live = False
        self.restoring = False
        self.in_flight = 0
        self.failures = 0
        self.retry_at = 0.0
        self.error = "not reached yet"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request on a connection of its own; returns the decoded reply, None where there is none.

        Raises ReplicaError where the server is down or failing, RolloutError where it refuses the request.
        """
        connection = self._connect()
        try:
            text = _read(self._request(connection, method, path, body).read)
            return json.loads(text) if text else None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ReplicaError(f"{path}: {error!r}") from error
        finally:
            connection.close()

    def check(self) -> str:
        """Checks the server's health and returns its policy version."""
        self.call("GET", "/health")
        info = self.call("GET", "/weight_info")
        if not isinstance(info, dict) or not isinstance(info.get("weight_version"), str):
            raise ReplicaError(f"/weight_info: names no version: {str(info)[:200]}")
        version: str = info["weight_version"]
        return version

    def stream(self, body: dict[str, Any], version: str) -> Generator[dict[str, Any], None, None]:
        """Generates one response; yields vLLM's choices, the last of which has a finish_reason.

        Closing the iterator ends the generation on the server. Raises ReplicaError where the server dies, stalls for
        longer than the timeout, or does not hold exactly `version`.
        """
        connection = self._connect()
        try:
            held = json.loads(_read(self._request(connection, "GET", "/weight_info", None).read))["weight_version"]
            if held != version:
                raise ReplicaError(f"holds policy version {held!r}, not {version!r}")
            response = self._request(connection, "POST", "/inference/v1/generate", {**body, "stream": True})
            while True:
                line = _read(response.readline)
                if not line:
                    raise ReplicaError("the connection closed in the middle of a response")
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ReplicaError(f"generation failed: {chunk['error']}")
                for choice in chunk["choices"]:
                    if choice["finish_reason"] is not None:
                        _check_versions(choice, version)
                    yield choice
                    if choice["finish_reason"] is not None:
                        return
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ReplicaError(f"generation: {error!r}") from error
        except (KeyError, TypeError, AttributeError) as error:  # JSON, and not what vLLM replies
            raise ReplicaError(f"generation: a reply in another form: {error!r}") from error
        finally:
            connection.close()

    def load_files(self, paths: list[str], version: str) -> None:
        """Makes the server load parameters from safetensors files and take over `version`."""
        self.begin_update()
        try:
            self.call("POST", "/start_weight_update")
        except ReplicaError:  # a trainer that died in the middle of a hand-over left it open
            self.call("POST", "/finish_weight_update", {})
            self.call("POST", "/start_weight_update")
        for path in paths:
            self.call("POST", "/update_weights", {"update_info": {"path": path}})
        self.call("POST", "/finish_weight_update", {})
        self.end_update(version)

    def begin_update(self) -> None:
        """Ends running responses and withdraws the policy version: half a hand-over must not pass for a whole one."""
        self.call("POST", "/pause?mode=abort")
        self.call("POST", "/update_weight_version", {"new_version": "incomplete"})

    def end_update(self, version: str) -> None:
        """Drops what was computed with the old parameters, then states the new version."""
        done = self.call("POST", "/reset_prefix_cache")
        if not isinstance(done, dict) or not done.get("success"):
            raise ReplicaError("kept its prefix cache after a hand-over")
        self.call("POST", "/update_weight_version", {"new_version": version})
        self.call("POST", "/resume")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except OSError as error:
            raise ReplicaError(f"no connection: {error}") from error
        connection.sock.settimeout(self._timeout_s)
        connection.auto_open = 0  # a connection that closed is not quietly replaced: another process may answer by then
        return connection

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        path = self._parts.path.rstrip("/") + path
        connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        response = connection.getresponse()
        if response.status < 400:
            return response
        text = response.read(2000).decode(errors="replace")
        if response.status in (401, 403):
            raise RolloutError(f"vLLM server {self.url} refused the API key (HTTP {response.status}): {text}")
        if response.status == 404:
            raise RolloutError(f"vLLM server {self.url} lacks {path}; start it with megatron_opd.rollout.vllm.serve")
        if response.status < 500:
            raise RolloutError(f"vLLM server {self.url} refused {path} (HTTP {response.status}): {text}")
        raise ReplicaError(f"{path} failed (HTTP {response.status}): {text}")


def _read(read: Callable[[int], bytes]) -> bytes:
    """What a server sends, if it is not more than any reply of vLLM's. Raises ReplicaError."""
    text = read(LARGEST_REPLY + 1)
    if len(text) > LARGEST_REPLY:
        raise ReplicaError(f"sends more than {LARGEST_REPLY >> 20} MB at once")
    return text


def _check_versions(choice: dict[str, Any], version: str) -> None:
    spans = choice.get("weight_versions")
    if not spans or any(span["version"] != version for span in spans):
        raise ReplicaError(f"a response was sampled by {spans}, not by policy version {version!r}")


class Pool:
    """All replicas: who is free, who is down, and when to try again. Thread-safe."""

    def __init__(self, replicas: list[Replica], slots: int):
        self.replicas, self.slots = replicas, slots
        self._changed = threading.Condition()

    def acquire(self, restore: Callable[[Replica], None], failed: Counter[Replica]) -> Replica | None:
        """A slot on the least loaded of the live replicas that have failed this response least often, waiting until one
        is free; None where no replica is live.

        Replicas that are down and whose time has come are tried first: `restore` checks one, hands it the parameters
        that it lacks, and raises ReplicaError where that fails.
        """
        while True:
            with self._changed:
                due = next((r for r in self.replicas if self._due(r)), None)
                if due is None:
                    live = [r for r in self.replicas if r.live]
                    fewest = min((failed[r] for r in live), default=0)
                    live = [r for r in live if failed[r] == fewest]
                    free = [r for r in live if r.in_flight < self.slots]
                    if free:
                        replica = min(free, key=lambda r: r.in_flight)
                        replica.in_flight += 1
                        return replica
                    if not live and not any(r.restoring for r in self.replicas):
                        return None
                    self._changed.wait(1.0)
                    continue
                due.restoring = True
            self._restore(due, restore)

    def restore_all(self, restore: Callable[[Replica], None]) -> None:
        """Tries every replica now, all at once; those that fail are down."""
        threads = [threading.Thread(target=self._restore, args=(r, restore)) for r in self.replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def release(self, replica: Replica, succeeded: bool) -> None:
        """Gives a slot back. A response that succeeded ends the doubling of the replica's back-off."""
        with self._changed:
            replica.in_flight -= 1
            if succeeded:
                replica.failures = 0
            self._changed.notify_all()

    def mark_down(self, replica: Replica, error: ReplicaError) -> None:
        """Takes a replica out until its back-off is over."""
        with self._changed:
            if replica.live:
                self._down(replica, str(error))

    @property
    def live(self) -> list[Replica]:
        """The replicas in use."""
        return [replica for replica in self.replicas if replica.live]

    def describe(self) -> str:
        """Every address with its state."""
        return "; ".join(f"{r.url}: {'live' if r.live else r.error}" for r in self.replicas)

    def _due(self, replica: Replica) -> bool:
        return not replica.live and not replica.restoring and replica.retry_at <= time.monotonic()

    def _restore(self, replica: Replica, restore: Callable[[Replica], None]) -> None:
        error: str | None = None
        try:
            restore(replica)
        except (ReplicaError, RolloutError) as failed:
            error = str(failed)
        with self._changed:
            replica.restoring = False
            if error is None:
                replica.live = True
            else:
                self._down(replica, error)
            self._changed.notify_all()

    def _down(self, replica: Replica, error: str) -> None:
        replica.live, replica.error = False, error
        replica.failures += 1
        replica.retry_at = time.monotonic() + backoff_s(replica.failures)
