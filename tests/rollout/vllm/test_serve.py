"""What stands before a vLLM server: nobody gets in without the key, and nobody's request is too much or in the way.

The guard runs in uvicorn, as in vLLM, around an application that counts what reaches it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec

import pytest

from megatron_opd.rollout.vllm.serve import LARGEST_BODY, RequireKey

pytestmark = pytest.mark.skipif(find_spec("uvicorn") is None, reason="uvicorn, which vLLM brings, is not installed")
KEY = "a-key-of-this-test"


class App:
    """Answers every request with what its body said; counts."""

    def __init__(self):
        self.served: list[str] = []
        self.sockets = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            return await send({"type": "lifespan.shutdown.complete"})
        if scope["type"] == "websocket":
            self.sockets += 1
            return await send({"type": "websocket.accept"})
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                return None
            body, more = body + part.get("body", b""), part.get("more_body", False)
        self.served.append(f"{scope['path']} {body.decode()}")
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server():
    import uvicorn

    app = App()
    os.environ["VLLM_API_KEY"] = KEY
    guarded = RequireKey(app)
    del os.environ["VLLM_API_KEY"]
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    running = uvicorn.Server(uvicorn.Config(guarded, log_level="error", lifespan="on"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield app, listener.getsockname()[1]
    running.should_exit = True
    thread.join()


def send(port, head, body=b"", key=KEY):
    """A request's own bytes; the status and the body of what comes back."""
    authorization = f"Authorization: Bearer {key}\r\n" if key is not None else ""
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        # A small body goes with the head: what arrived after the server had closed would lose its answer.
        together, apart = (body, b"") if len(body) < 1024 else (b"", body)
        connection.sendall(f"{head}\r\nHost: x\r\n{authorization}\r\n".encode() + together)
        try:
            connection.sendall(apart)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:  # it has said no and closed
            answer = b"HTTP/1.1 000 closed"
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "key", [None, "", "wrong", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY}\r\nAuthorization: Bearer x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/update_weights", "/health/../update_weights", "//health", "/Health"])
def test_without_the_key_nothing_but_the_health_check_is_reached(server, key, path):
    app, port = server
    before = len(app.served)
    assert send(port, f"GET {path} HTTP/1.1\r\nConnection: close", key=key)[0] == 401
    assert len(app.served) == before
    assert send(port, "GET /health HTTP/1.1\r\nConnection: close", key=key)[0] == 200


@pytest.mark.parametrize("path", ["/%68ealth/../update_weights", "/health%2f..%2fupdate_weights", "/health;/x"])
def test_an_encoded_path_is_not_the_health_check(server, path):
    assert send(server[1], f"POST {path} HTTP/1.1\r\nConnection: close", key=None)[0] == 401


def test_web_sockets_need_the_key(server):
    app, port = server
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    for path in ("/v1/realtime", "/health"):
        assert send(port, f"GET {path} HTTP/1.1\r\n{upgrade}", key="wrong")[0] in (401, 403)
    assert app.sockets == 0


@pytest.mark.parametrize(("key", "status"), [("wrong", 401), (KEY, 413)])
def test_a_body_of_a_gigabyte_is_refused_and_not_read(server, key, status):
    app, port = server
    before = len(app.served)
    head = f"POST /update_weights HTTP/1.1\r\nContent-Length: {1 << 30}"
    assert send(port, head, key=key)[0] == status  # none of it was sent
    assert send(port, head, bytes(1 << 20), key=key)[0] in (status, 0)
    assert len(app.served) == before


def test_a_body_of_unknown_length_is_refused(server):
    chunked = "POST /update_weights HTTP/1.1\r\nTransfer-Encoding: chunked"
    assert send(server[1], chunked, b"5\r\nhello\r\n", key="wrong")[0] == 401
    assert send(server[1], chunked, b"5\r\nhello\r\n")[0] == 411


def test_the_largest_body_of_a_trainer_passes(server):
    body = b"a" * (8 << 20)
    assert len(body) < LARGEST_BODY
    head = f"POST /inference/v1/generate HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}"
    assert send(server[1], head, body) == (200, body)


def test_five_hundred_requests_at_once_beside_slow_clients(server):
    """Each is answered once, while a hundred clients have sent half of theirs and wait."""
    app, port = server
    app.served.clear()
    with ExitStack() as open_ones:
        for number in range(100):
            slow = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            head = f"POST /slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 10\r\n\r\n"
            slow.sendall(head.encode()[: 30 + number] if number % 2 else head.encode() + b"half")

        def ask(number):
            body = json.dumps({"number": number}).encode()
            head = f"POST /generate HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}"
            return send(port, head, body) == (200, body)

        with ThreadPoolExecutor(500) as pool:
            assert all(pool.map(ask, range(500)))
    served = [line for line in app.served if line.startswith("/generate")]
    assert sorted(served) == sorted("/generate " + json.dumps({"number": number}) for number in range(500))
    assert not any(line.startswith("/slow") for line in app.served)
