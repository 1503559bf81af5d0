"""Parameters to vLLM servers by vLLM's native weight transfer, over NCCL or CUDA IPC. Needs GPUs on both sides.

vLLM's trainer engines drive one server through a client object. `FanOut` is such a client for several: all of them join
one NCCL group (rank 0 of the trainer, then every worker of the first server, of the second, ...) and receive one
broadcast. CUDA IPC needs the servers' GPUs to be the trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.utils.network_utils import get_ip, get_open_port

from megatron_opd.compat.vllm import as_json
from megatron_opd.rollout.vllm.client import Replica

NamedParameters = Callable[[], Iterator[tuple[str, Tensor]]]


class StudentSource(WeightSource):
    """The trainer's parameters as vLLM iterates them. The first pass costs one more gather: it learns the shapes."""

    def __init__(self) -> None:
        self.named_parameters: NamedParameters | None = None
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every parameter; collective the first time."""
        if self._metadata is None:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.named_parameters is not None
        for name, tensor in self.named_parameters():
            yield name, tensor.detach()


class FanOut:
    """vLLM's weight sync client for several servers at once; any server's error is raised."""

    def __init__(self, replicas: list[Replica]):
        self.replicas = replicas

    def world_sizes(self) -> list[int]:
        """Workers of each server."""
        return [reply["world_size"] for reply in self._all("GET", "/get_world_size", [None] * len(self.replicas))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server's workers join behind those of the servers before it."""
        bodies, offset = [], init_info.get("rank_offset", 0)
        sizes = self.world_sizes() if "rank_offset" in init_info else [0] * len(self.replicas)
        for size in sizes:
            info = {**init_info, "rank_offset": offset} if "rank_offset" in init_info else init_info
            bodies.append({"init_info": info})
            offset += size
        self._all("POST", "/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        """Opens a hand-over on every server."""
        self._all("POST", "/start_weight_update", [None] * len(self.replicas))

    def update_weights(self, update_info: Any) -> None:
        """Announces what is sent; returns once every server has received it."""
        body = {"update_info": as_json(update_info)}
        self._all("POST", "/update_weights", [body] * len(self.replicas))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Closes the hand-over. The version is stated later, when the prefix caches are empty."""
        self._all("POST", "/finish_weight_update", [{}] * len(self.replicas))

    def _all(self, method: str, path: str, bodies: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.replicas)) as executor:
            return list(executor.map(lambda r, body: r.call(method, path, body), self.replicas, bodies))


class NativeTransfer:
    """One connection to the live servers, made anew where they change. All methods are collective over the trainer."""

    def __init__(self, backend: str, bucket_bytes: int, replicas: list[Replica]):
        if not torch.cuda.is_available():
            raise ValueError(f"rollout.vllm.transfer: {backend} needs GPUs; without one use transfer: file")
        self.backend, self.bucket_bytes = backend, bucket_bytes
        self.replicas = {replica.url: replica for replica in replicas}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.source = StudentSource()
        self._connected: list[str] = []
        self._engine: Any = None

    def send(self, named_parameters: NamedParameters, live: list[str]) -> None:
        """Sends all parameters to the servers at `live`, in buffers of at most `bucket_bytes`."""
        self.source.named_parameters = named_parameters
        if live != self._connected:
            self.close()
            self._connect(live)
        self._engine.send_weights()

    def close(self) -> None:
        """Leaves the NCCL group."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._connected = []

    def _connect(self, live: list[str]) -> None:
        client = FanOut([self.replicas[url] for url in live])
        if self.backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info: Any = IPCTrainerInitInfo(rank=self.rank, packed=True, packed_buffer_size_bytes=self.bucket_bytes)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            first = self.rank == 0  # the others only take part in gathering
            info = NCCLTrainerInitInfo(
                rank=self.rank,
                master_address=get_ip() if first else "",
                master_port=get_open_port() if first else 0,
                world_size=1 + sum(client.world_sizes()) if first else 0,
                packed=True,
                packed_buffer_size_bytes=self.bucket_bytes,
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self.source)
        self._connected = live
