"""Starts one vLLM server that takes parameters from a trainer:

    python -m megatron_opd.rollout.vllm.serve --model DIR --port 8001 [--host 127.0.0.1] [--tensor N] [-- VLLM OPTIONS]

It is `vllm serve` with what `rollout.vllm.mode: server` relies on: token ids in and out, raw log-probs, the weight
transfer routes (nccl, ipc or file), and, since vLLM guards only its generation routes with the API key, a guard for all
others. It starts with random parameters: the trainer hands over its own before the first response. The API key is read
from the environment variable that `--api-key-env` names, so that it shows in no process list.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import secrets
import sys
from typing import Any

API_KEY_ENV = "MEGATRON_OPD_VLLM_API_KEY"
OPEN_PATHS = ("/health", "/ping")
LARGEST_BODY = 64 << 20  # bytes; token ids of a long prompt, or names and handles of all parameters, are some MB


class RequireKey:
    """ASGI middleware: every route but the health check needs `Authorization: Bearer KEY`, KEY being VLLM_API_KEY, and
    no request has more than LARGEST_BODY bytes. What is refused is not read."""

    def __init__(self, app: Any):
        self.app, self.key = app, os.environ.get("VLLM_API_KEY", "")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's own start and end
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, error = refused
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

    def _refused(self, scope: Any) -> tuple[int, str] | None:
        """The HTTP status and why, or None."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        is_open = scope["type"] == "http" and scope["path"] in OPEN_PATHS
        if self.key and not is_open:
            if len(given) != 1 or not secrets.compare_digest(given[0], f"Bearer {self.key}".encode()):
                return 401, "Unauthorized"
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers:
            return 411, "state the length of the body"
        if int(headers.get(b"content-length", b"0")) > LARGEST_BODY:  # the server has checked that it is a number
            return 413, f"more than {LARGEST_BODY} bytes"
        return None


def build_parser() -> argparse.ArgumentParser:
    """The command's options; the defaults suit `rollout:` defaults."""
    parser = argparse.ArgumentParser(prog="python -m megatron_opd.rollout.vllm.serve", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory; its config alone is used")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; not loopback: needs an API key")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus response; default: the model's own")
    parser.add_argument("--max-batch", type=int, default=256, help="responses in generation at once: rollout.max_batch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="as student.precision")
    parser.add_argument(
        "--transfer", choices=["auto", "nccl", "ipc", "file"], default="auto", help="rollout.vllm.transfer"
    )
    parser.add_argument("--cpu-cache-mb", type=int, default=512, help="key/value cache without a GPU")
    parser.add_argument("--api-key-env", default=API_KEY_ENV, help="environment variable with the API key")
    parser.add_argument("vllm", nargs="*", help="after --: further options of `vllm serve`")
    return parser


def serve_command(args: argparse.Namespace, gpu: bool) -> tuple[list[str], dict[str, str]]:
    """The arguments of `vllm serve` and the environment variables that it needs.

    Raises ValueError where the server would be open to the network without an API key, or a transfer needs a GPU.
    """
    key = os.environ.get(args.api_key_env, "")
    if not key and not _is_loopback(args.host):
        raise ValueError(f"--host {args.host} is open to the network: set an API key in {args.api_key_env}")
    transfer = args.transfer if args.transfer != "auto" else ("nccl" if gpu else "file")
    if transfer != "file" and not gpu:
        raise ValueError(f"--transfer {transfer} needs GPUs; without one use --transfer file")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # adds the weight transfer routes
    if key:
        environment["VLLM_API_KEY"] = key
    if transfer == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # CUDA IPC handles travel pickled; the key guards them
    command = ["--model", args.model, "--host", args.host, "--port", str(args.port)]
    command += ["--tensor-parallel-size", str(args.tensor), "--max-num-seqs", str(args.max_batch)]
    command += ["--dtype", {"fp32": "float32", "bf16": "bfloat16"}[args.precision], "--load-format", "dummy"]
    command += ["--tokens-only", "--generation-config", "vllm", "--stream-interval", "8"]
    command += ["--logprobs-mode", "raw_logprobs", "--max-logprobs", "-1"]
    command += ["--weight-transfer-config", json.dumps({"backend": transfer})]
    command += ["--worker-extension-cls", "megatron_opd.rollout.vllm.weight_transfer.WorkerExtension"]
    command += ["--middleware", "megatron_opd.rollout.vllm.serve.RequireKey"]
    if args.max_model_len:
        command += ["--max-model-len", str(args.max_model_len)]
    if not gpu:
        if args.tensor == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # model and scheduler in one process: starts sooner
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(args.cpu_cache_mb << 20)]
        command += ["--no-enable-chunked-prefill"]  # a prompt in parts needs generators that only GPUs have
    return command + args.vllm, environment


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    """Becomes the vLLM server."""
    args = build_parser().parse_args()
    import torch

    try:
        command, environment = serve_command(args, torch.cuda.is_available())
    except ValueError as error:
        sys.exit(f"vllm_serve: {error}")
    os.environ.update(environment)
    from megatron_opd.compat.vllm import serve

    sys.argv[1:] = command
    try:
        serve()
    except ValueError as error:  # pydantic's are, too
        from megatron_opd.rollout.vllm.common import refusal

        sys.exit(f"vllm_serve: vLLM refuses {args.model} with these options: {refusal(error)}")


if __name__ == "__main__":
    main()
