"""A malicious pickle in every file that a command reads: `python -m tests.commands.pickles FOLDER`, a JSON report.

The pickles make a folder when they are loaded. Sizes that a manifest states are made to fit, so that the pickle is what
the reader meets.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.commands.lab import Lab


class Payload:
    """Unpickled, it makes a folder; it may pass for something else with these bytes."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def plain(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def saved(content: Any) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def beside_metadata(marker: Path, metadata: bytes) -> bytes:
    """An index as it should be, that makes the folder on the way."""
    return pickle.dumps((Payload(marker), pickle.loads(metadata)))


def in_a_shard(marker: Path, part: Path) -> None:
    """The first tensor as a pickled object, as the index then says."""
    metadata: Metadata = pickle.loads((part / ".metadata").read_bytes())
    index, stored = next(iter((metadata.storage_data or {}).items()))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    shard = part / stored.relative_path
    stored.offset, stored.length = shard.stat().st_size, len(saved(Payload(marker)))
    metadata.storage_data = {**(metadata.storage_data or {}), type(index)(index.fqn): stored}
    shard.write_bytes(shard.read_bytes() + saved(Payload(marker)))
    (part / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_part(how: str, marker: Path, part: Path) -> None:
    """Into the folder of a distributed checkpoint."""
    path = part / how
    if how == ".metadata":
        path.write_bytes(beside_metadata(marker, path.read_bytes()))
    elif how == "common.pt":
        path.write_bytes(saved({"common": Payload(marker)}))
    elif how == "common.pt, plain":
        (part / "common.pt").write_bytes(plain(marker))
    elif how == "shard":
        (shard,) = part.glob("*.distcp")
        payload = saved(Payload(marker))
        metadata: Metadata = pickle.loads((part / ".metadata").read_bytes())
        for stored in (metadata.storage_data or {}).values():
            stored.offset, stored.length = 0, len(payload)
        shard.write_bytes(payload + bytes(max(0, shard.stat().st_size - len(payload))))
        (part / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        in_a_shard(marker, part)


PARTS = (".metadata", "common.pt", "common.pt, plain", "shard", "an object among the tensors")


class Planting:
    """One after the other: where a pickle lies, which command reads it, how that ended, and whether the pickle ran."""

    def __init__(self, folder: Path) -> None:
        self.lab = Lab(folder)
        self.first = folder / "first" / "checkpoints" / "step_000001"
        self.report: dict[str, dict[str, Any]] = {}

    def read(self, name: str, command: str, plant: Callable[[Path, Path], list[str]]) -> None:
        """`plant` is told which folder the pickle makes and where to put it, and gives the command's arguments."""
        place = self.lab.fresh("place")
        place.mkdir()
        marker = place.parent / "ran"
        arguments = plant(marker, place)
        code = self.lab.call("pickles", command, arguments)
        self.report[f"{command}: {name}"] = {"code": code, "ran": marker.exists(), "said": self.lab.said}

    def model(self, marker: Path, place: Path) -> Path:
        """A Hugging Face directory with pickled parameters, and with pickles that nothing should look at."""
        shutil.copytree(self.lab.folder / "student", place / "model")
        tensors = load_file(place / "model" / "model.safetensors")
        (place / "model" / "model.safetensors").unlink()
        (place / "model" / "pytorch_model.bin").write_bytes(saved({**tensors, "more": Payload(marker)}))
        for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin", "scheduler.pt", "rng_state.pth"):
            (place / "model" / name).write_bytes(plain(marker))
        return place / "model"

    def models(self) -> None:
        config, student = str(self.lab.tiny.config), str(self.lab.folder / "student")

        def run(place: Path) -> list[str]:
            return [f"run_dir={place / 'run'}", f"data.tokenizer={student}"]

        def imports(*more: str) -> Callable[[Path, Path], list[str]]:
            return lambda m, p: ["import", "--hf", str(self.model(m, p)), "--out", str(p / "out"), *more]

        def as_the(part: str, *more: str) -> Callable[[Path, Path], list[str]]:
            return lambda m, p: [config, f"{part}.model={self.model(m, p)}", *run(p), *more]

        self.read("pytorch_model.bin", "convert", imports())
        self.read("pytorch_model.bin, allowed", "convert", imports("--allow-pickle"))
        for part in ("student", "teacher"):
            self.read(f"{part}'s pytorch_model.bin", "train", as_the(part))
            self.read(f"{part}'s pytorch_model.bin, allowed", "train", as_the(part, f"{part}.allow_pickle=true"))
        self.read("pytorch_model.bin", "doctor", as_the("teacher"))
        self.read("pytorch_model.bin", "eval", lambda m, p: [config, "--checkpoint", str(self.model(m, p)), *run(p)])

    def checkpoints(self) -> None:
        config = str(self.lab.tiny.config)

        def planted(how: str, part: str, marker: Path, place: Path) -> Path:
            step = place / "run" / "checkpoints" / "step_000001"
            shutil.copytree(self.lab.folder / "first", place / "run")
            in_a_part(how, marker, step / part)
            manifest = json.loads((step / "megatron_opd.json").read_text())
            sizes = manifest["checkpoint"]["files"]
            manifest["checkpoint"]["files"] = {name: (step / name).stat().st_size for name in sizes}
            (step / "megatron_opd.json").write_text(json.dumps(manifest))
            return step

        def resumed(how: str, part: str) -> Callable[[Path, Path], list[str]]:
            return lambda m, p: [config, f"run_dir={planted(how, part, m, p).parents[1]}", "train.steps=2"]

        def evaluated(how: str) -> Callable[[Path, Path], list[str]]:
            return lambda m, p: [config, "--checkpoint", str(planted(how, "megatron", m, p)), f"run_dir={p / 'other'}"]

        def exported(how: str) -> Callable[[Path, Path], list[str]]:
            return lambda m, p: ["export", "--megatron", str(planted(how, "megatron", m, p)), "--out", str(p / "out")]

        for how in PARTS:
            for part in ("megatron", "optimizer"):
                self.read(f"{part}/, {how}", "train", resumed(how, part))
            self.read(f"megatron/, {how}", "eval", evaluated(how))
            self.read(f"megatron/, {how}", "convert", exported(how))

    def others(self) -> None:
        config = str(self.lab.tiny.config)

        def prompts(marker: Path, place: Path) -> list[str]:
            """Columns of a type that old versions of Arrow unpickled."""
            kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": plain(marker)}
            field = pa.field("prompt", pa.string(), metadata=kind)
            pq.write_table(pa.table([["a + b"] * 4], schema=pa.schema([field])), place / "p.parquet")
            return [config, f"data.prompts={place / 'p.parquet'}", f"run_dir={place / 'run'}"]

        def pieces(marker: Path, place: Path) -> list[str]:
            shutil.copytree(self.lab.folder / "student", place / "tokenizer")
            (place / "tokenizer" / "tokenizer.model").write_bytes(plain(marker))
            return [config, f"data.tokenizer={place / 'tokenizer'}", f"run_dir={place / 'run'}"]

        self.read("a type of Arrow's", "train", prompts)
        self.read("tokenizer.model", "train", pieces)


def main() -> int:
    planting = Planting(Path(sys.argv[1]))
    planting.models()
    planting.checkpoints()
    planting.others()
    print(json.dumps(planting.report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
