"""Tensors of a Hugging Face directory, read slice by slice and written in one pass.

Files are read with plain reads instead of a memory map: a map's pages count as the process's memory for as long as the
file is open, and a conversion promises to hold little more than its shard.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_opd.compat.dist_checkpointing import refused_pickle
from megatron_opd.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What travels with the parameters: tokenizer, chat template, generation settings, licence and model card.
_SIDE_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.md",
    "LICENSE*",
    "additional_chat_templates",
)


class ModelFileError(InputError):
    """A model directory cannot be used; the message names the file, the tensor or key, and what would work."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `start` is its first byte in `file`; pickled tensors carry themselves instead."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    loaded: Tensor | None = None


class HFTensors:
    """The tensors of one directory. Opening reads and checks the headers of all files, and no tensor."""

    def __init__(self, directory: str | Path, allow_pickle: bool = False):
        """Raises ModelFileError: no parameter files, pickled ones without `allow_pickle`, broken ones, or both a whole
        file and shards."""
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, BinaryIO] = {}
        if not self.directory.is_dir():
            raise ModelFileError(f"{directory}: no such directory")
        chosen = self._as_transformers_chooses(_WHOLE, INDEX)
        files = chosen or sorted(self.directory.glob("*.safetensors"))
        if files:
            self._add_files(files, _header)
        else:
            self._add_pickled(allow_pickle)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or rows `rows[0]` to `rows[1]` of its first dimension, on the CPU in the dtype of the file."""
        self.check_dtype(name)
        info = self.tensors[name]
        first, last = rows or (0, info.shape[0])
        if info.loaded is not None:
            return info.loaded[first:last].clone()
        out = torch.empty((last - first, *info.shape[1:]), dtype=DTYPES[info.dtype])
        row_bytes = math.prod(info.shape[1:]) * out.element_size()
        buffer = out.view(torch.uint8).numpy().reshape(-1).data if out.numel() else memoryview(b"")
        if info.file not in self._open:
            self._open[info.file] = open(info.file, "rb", buffering=0)
        file, done = self._open[info.file], 0
        file.seek(info.start + first * row_bytes)
        while done < len(buffer):
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                raise ModelFileError(f"{info.file}: truncated inside tensor {name}")
            done += count
        return out

    def check_dtype(self, name: str) -> None:
        """Raises ModelFileError unless the tensor's values can be read."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise ModelFileError(
                f"{info.file}: tensor {name} has dtype {info.dtype}, expected one of {', '.join(DTYPES)}; "
                "quantised checkpoints cannot be converted"
            )

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _as_transformers_chooses(self, whole: str, index: str) -> list[Path]:
        """The whole file or the index of shards, whichever transformers would read; nothing where there is neither.

        It takes the whole file without a look at the index, which its `save_pretrained` leaves behind when a sharded
        model is saved again as one file. The other way round, whole and then sharded, the whole file stays and is the
        older one, so both together are refused.
        """
        one, listed = self.directory / whole, self.directory / index
        if not one.exists():
            return [listed] if listed.exists() else []
        others = sorted(set(_read_index(listed).values()) - {whole}) if listed.exists() else []
        if others and all((self.directory / name).exists() for name in others):
            raise ModelFileError(
                f"{self.directory}: has both {whole} and the {len(others)} shards of {index}; one of them is stale "
                f"(transformers would read {whole}): remove it"
            )
        return [one]

    def _add_files(self, files: list[Path], load: Callable[[Path], dict[str, TensorInfo]]) -> None:
        for file in files:
            if file.suffix == ".json":
                self._add_indexed(file, load)
            else:
                self._add(file, load(file))

    def _add(self, file: Path, tensors: dict[str, TensorInfo]) -> None:
        for name, info in tensors.items():
            if name in self.tensors:
                raise ModelFileError(f"tensor {name} is in both {self.tensors[name].file} and {file}")
            self.tensors[name] = info

    def _add_indexed(self, index: Path, load: Callable[[Path], dict[str, TensorInfo]]) -> None:
        placed = _read_index(index)
        for file_name in sorted(set(placed.values())):
            file = self.directory / file_name
            if not file.exists():
                tensor = next(name for name, file in placed.items() if file == file_name)
                raise ModelFileError(f"{file}: missing, although {index.name} places tensor {tensor} there")
            self._add(file, load(file))
        for name, file_name in placed.items():
            if name not in self.tensors:
                file = self.directory / file_name
                raise ModelFileError(f"{file}: lacks tensor {name}, which {index.name} places there")

    def _add_pickled(self, allow_pickle: bool) -> None:
        files = sorted(self.directory.glob("pytorch_model*.bin"))
        if not files:
            raise ModelFileError(f"{self.directory}: no *.safetensors file")
        if not allow_pickle:
            raise ModelFileError(
                f"{files[0]}: pickled parameters are refused: loading a pickle can run any code of its author; "
                "convert it to safetensors or, if you trust it, pass --allow-pickle (config: allow_pickle: true)"
            )
        chosen = self._as_transformers_chooses("pytorch_model.bin", "pytorch_model.bin.index.json")
        self._add_files(chosen or files, _unpickle)


def check_tied(files: HFTensors) -> None:
    """Raises ModelFileError where a stored output layer is not the embedding that config.json ties it to: transformers
    would keep the stored one, Megatron-Core and vLLM would use the embedding."""
    if HEAD not in files.tensors or EMBEDDING not in files.tensors:
        return
    shape = files.tensors[EMBEDDING].shape
    step = max(1, (16 << 20) // (math.prod(shape[1:]) * 4))
    equal = files.tensors[HEAD].shape == shape and all(
        torch.equal(files.read(HEAD, part).float(), files.read(EMBEDDING, part).float())
        for part in ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    )
    if not equal:
        raise ModelFileError(
            f"{files.tensors[HEAD].file}: {HEAD} differs from {EMBEDDING}, although config.json ties them; set "
            "tie_word_embeddings to false there if the model has an output layer of its own, or remove the tensor"
        )


def _read_index(index: Path) -> dict[str, str]:
    """Where an index places each tensor: the name of a file beside it. Raises ModelFileError."""
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{index}: not a readable index ({error!r})") from error
    for tensor, name in files.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFileError(f"{index}: places tensor {tensor} in {name!r}, which is no file of this directory")
    return files


def _header(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds: 8 bytes of header length, a JSON header, the tensors' bytes."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelFileError(f"{file}: truncated inside its header ({size} bytes)")
            header: Any = json.loads(stream.read(length))
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file}: not a safetensors file (its header is not JSON)") from error
    try:
        header.pop("__metadata__", None)
        return _placed(file, header, 8 + length, size)
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ModelFileError(f"{file}: not a safetensors file (its header lists no tensors: {error!r})") from error


def _placed(file: Path, header: dict[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header; their bytes begin at `data` in a file of `size` bytes."""
    tensors_of_file = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ModelFileError(f"{file}: tensor {name} has shape {shape} at {start} to {end}, which is none")
        if data + end > size:
            raise ModelFileError(
                f"{file}: truncated: tensor {name} ends at byte {data + end}, the file at {size}; copy it again"
            )
        dtype = DTYPES.get(entry["dtype"])
        if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
            wanted = f"{entry['dtype']} {shape}"
            raise ModelFileError(f"{file}: tensor {name} has {end - start} bytes, which is not {wanted}")
        tensors_of_file[name] = TensorInfo(file, entry["dtype"], shape, data + start)
    return tensors_of_file


def _unpickle(file: Path) -> dict[str, TensorInfo]:
    try:
        # torch's restricted unpickler as a second line of defence; the first is that the user had to ask for this
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ModelFileError(f"{file}: cannot be read as a pickled state dict ({refused_pickle(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelFileError(f"{file}: holds something else than a state dict, names with their tensors")
    return {
        name: TensorInfo(file, _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), loaded=tensor)
        for name, tensor in tensors.items()
    }


class SafetensorsWriter:
    """Writes sharded safetensors in one pass: every tensor goes to its final place as it comes, in any order."""

    def __init__(
        self, directory: str | Path, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], max_shard_bytes: int
    ):
        """Plans the files for `tensors` (name, shape, dtype); none exceeds `max_shard_bytes` unless one tensor does."""
        self.directory = Path(directory)
        self._plan: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self._files: list[int] = []
        shards: list[dict[str, Any]] = []
        used = max_shard_bytes + 1
        for name, shape, dtype in tensors:
            size = math.prod(shape) * dtype.itemsize
            if used + size > max_shard_bytes and (used or not shards):
                shards.append({"__metadata__": {"format": "pt"}})
                used = 0
            shards[-1][name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [used, used + size]}
            self._plan[name] = (len(shards) - 1, used, tuple(shape), dtype)
            used += size
        self._left = set(self._plan)
        self._names = [_shard_name(i, len(shards)) for i in range(len(shards))]
        data_start = []
        for name, header in zip(self._names, shards, strict=True):
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._files.append(os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            self._put(self._files[-1], len(text).to_bytes(8, "little") + text, 0)
            data_start.append(8 + len(text))
        self._data_start = data_start
        self.total_bytes = sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in self._plan.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises ModelFileError for a tensor that was not planned so, OSError where the disk is full."""
        if name not in self._left:
            raise ModelFileError(f"{name}: written twice or not planned")
        shard, offset, shape, dtype = self._plan[name]
        if tuple(tensor.shape) != shape:
            raise ModelFileError(f"{name}: shape {tuple(tensor.shape)}, planned {shape}")
        data = tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy()
        self._put(self._files[shard], data.reshape(-1).data, self._data_start[shard] + offset)
        self._left.discard(name)

    def finish(self) -> None:
        """Flushes and closes; several files get an index. Raises ModelFileError where a tensor was never written."""
        if self._left:
            raise ModelFileError(f"{len(self._left)} tensors were never written, {min(self._left)} among them")
        for file in self._files:
            os.fsync(file)
        self.close()
        if len(self._names) > 1:
            weight_map = {name: self._names[plan[0]] for name, plan in sorted(self._plan.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    @staticmethod
    def _put(file: int, data: bytes | memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(file, data[done:], offset + done)


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def side_files(directory: str | Path) -> list[Path]:
    """Files that travel with the parameters: configuration, tokenizer, chat template, generation settings, card."""
    paths = {path for pattern in _SIDE_FILES for path in Path(directory).glob(pattern)}
    own = ("state.json", "megatron_opd.json")  # of a run's checkpoint and of a converted directory
    return sorted(path for path in paths if not path.name.endswith(".index.json") and path.name not in own)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 500MB")
    number, letter, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
    if size <= 0:
        raise ValueError(f"{text!r}: a size must be above 0")
    return size
