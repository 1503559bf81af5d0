"""What `convert.py` does in each of its processes."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from megatron_opd.config import ConfigError, ModelConfig, ParallelConfig
from megatron_opd.data.tokenizer import TokenizerError, load_tokenizer
from megatron_opd.models.build import build_model
from megatron_opd.models.compare import difference, load_transformers, megatron_logits, transformers_logits
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import all_gather, from_rank_0, is_rank_0, together
from megatron_opd.parallel.groups import teacher_layout
from megatron_opd.weights.bridge import read_hf_config
from megatron_opd.weights.converted import (
    check_free,
    is_converted,
    load_converted,
    read_manifest,
    save_converted,
)
from megatron_opd.weights.export import planned_tensors, save_hf
from megatron_opd.weights.families import own_family
from megatron_opd.weights.hf_files import HEAD, HFTensors, ModelFileError, parse_size
from megatron_opd.weights.loading import check_names, load_hf
from megatron_opd.weights.parameters import hf_names

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
TEXT = (
    "To find how many apples are left, start with the twelve in the basket. Anna eats two of them and gives half of "
    "the rest to her brother, so there are (12 - 2) / 2 = 5. Therefore, the answer is \\boxed{5}.\n\nSolve for x: "
    "3x + 7 = 22. Subtract 7 from both sides to get 3x = 15, and divide by 3: x = 5. Let me check: 3 * 5 + 7 = 22."
)


def import_(args: argparse.Namespace) -> int:
    """Hugging Face directory -> converted directory."""
    with together():
        if is_converted(args.hf):
            raise ModelFileError(f"{args.hf}: already converted; use it as it is, or give the Hugging Face directory")
        config = read_hf_config(args.hf, own_family("--family", args.family))
        check_free(args.out)
        with HFTensors(args.hf, args.allow_pickle) as files:
            precision, notes = plan_import(files, args.dtype, tied=bool(config.tie_word_embeddings))
            size = sum(math.prod(info.shape) for info in files.tensors.values()) * PRECISIONS[precision].itemsize
        check_space(args.out, size)
    say(f"{args.hf}: {config.model_type}, {size / 2**30:.2f} GiB as {precision}, tensor {args.tp} x pipeline {args.pp}")
    meter = Meter()
    model = build(args, args.hf, precision)
    with progress_bar("reading", shard_bytes(model)) as advance:
        load_hf(model, args.hf, args.allow_pickle, advance)
    save_converted(model, args.hf, args.out, notes)
    meter.report(shard_bytes(model))
    say(f"wrote {args.out}")
    return 0


def export_(args: argparse.Namespace) -> int:
    """Converted directory -> Hugging Face directory."""
    with together():
        try:
            limit = parse_size(args.max_shard_size)
        except ValueError as error:
            raise ConfigError(f"--max-shard-size: {error}") from error
        manifest = read_manifest(args.megatron)
        read_hf_config(args.megatron, own_family("--family", args.family))
        check_free(args.out)
    meter = Meter()
    precision = next(name for name, dtype in PRECISIONS.items() if str(dtype) == f"torch.{manifest['dtype']}")
    model = build(args, args.megatron, precision)
    load_converted(model, args.megatron)
    plan = planned_tensors(model)
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.values())
    with together():
        check_space(args.out, size)
    with progress_bar("writing", size) as advance:
        save_hf(
            model,
            args.megatron,
            args.out,
            max_shard_bytes=limit,
            notes=manifest,
            progress=advance,
        )
    meter.report(shard_bytes(model))
    say(f"wrote {args.out}")
    return 0


def verify_(args: argparse.Namespace) -> int:
    """Logits of a Hugging Face directory by transformers and of a converted one by Megatron-Core."""
    tolerance = DEFAULT_TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    with together():
        stored = getattr(torch, read_manifest(args.megatron)["dtype"]) if is_converted(args.megatron) else None
        family = own_family("--family", args.family)
        vocabularies = [read_hf_config(directory, family).vocab_size for directory in (args.hf, args.megatron)]
        if vocabularies[0] != vocabularies[1]:
            raise ModelFileError(f"{args.hf} has {vocabularies[0]} tokens, {args.megatron} {vocabularies[1]}")
        texts = make_texts(args, vocabularies[0])
    model = build(args, args.megatron, args.dtype, load=True)
    names = hf_names(model)
    reference: Any = None
    with together():
        with HFTensors(args.hf, args.allow_pickle) as files:
            check_names(files, names, model.bridge)
        if is_rank_0():
            dtype = PRECISIONS[args.dtype]
            reference = load_transformers(args.hf, stored or dtype, dtype, args.allow_pickle)
    worst = 0.0
    for name, tokens in texts:
        logits = megatron_logits(model, tokens)
        if is_rank_0():
            found = difference(logits, transformers_logits(reference, tokens))
            worst = max(worst, found.relative)
            say(
                f"{name}: {found.positions} positions: largest difference {found.largest:.3g} at {found.position} "
                f"({found.relative:.3g} of the largest logit), top-1 agreement {found.top1_agreement:.2%}"
            )
    worst = from_rank_0(worst)
    agree = worst <= tolerance
    say(
        f"{'equal' if agree else 'DIFFERENT'} within {tolerance:g} in {args.dtype}"
        if agree
        else f"DIFFERENT: {worst:.3g} of the largest logit, allowed {tolerance:g} in {args.dtype}"
    )
    return 0 if agree else 1


def plan_import(files: HFTensors, dtype: str | None, tied: bool) -> tuple[str, dict[str, Any]]:
    """The precision to keep a model in, and what an export needs to know to give back the same tensors.

    Without `dtype`: bf16 if all tensors are bf16, else fp32, which holds bf16 and fp16 exactly; `dtypes` then names the
    tensors to write in another one. Raises ModelFileError: an unreadable dtype.
    """
    found = {}
    for name, info in files.tensors.items():
        if not name.endswith("rotary_emb.inv_freq"):
            files.check_dtype(name)
            found[name] = info.dtype
    notes: dict[str, Any] = {}
    precision = dtype or ("bf16" if set(found.values()) == {"BF16"} else "fp32")
    if dtype is None:
        most = "BF16" if precision == "bf16" else "F32"
        notes["dtypes"] = {name: kind for name, kind in found.items() if kind != most}
    elif precision == "bf16" and (rounded := sum(kind != "BF16" for kind in found.values())):
        say(f"note: --dtype bf16 rounds {rounded} of {len(found)} tensors; an export will not give them back")
    if tied and HEAD in found:
        notes["tied_copy"] = True
    return precision, notes


def check_space(out: Path, needed: int) -> None:
    """Raises ModelFileError where the file system of `out` has less than `needed` bytes free."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ModelFileError(
            f"{out}: no space left: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free at {place}; "
            "free some or write elsewhere"
        )


def make_texts(args: argparse.Namespace, vocab_size: int) -> list[tuple[str, torch.Tensor]]:
    """Random tokens and, if the directory has a tokenizer, real text: names and token ids [T]."""
    generator = torch.Generator().manual_seed(0)
    texts = [("random tokens", torch.randint(0, vocab_size, (args.length,), generator=generator))]
    sources = {"real text": TEXT}
    if args.text is not None:
        sources[str(args.text)] = args.text.read_text()
    try:
        tokenizer = load_tokenizer(args.hf)
    except TokenizerError as error:
        if args.text is not None:
            raise ModelFileError(f"--text {args.text} needs a tokenizer: {error}") from error
        say(f"note: random tokens only: {error}")
        return texts
    for name, text in sources.items():
        ids = tokenizer.encode(text)[: args.length]
        if not ids:
            raise ModelFileError(f"{name}: no tokens to compare on")
        texts.append((name, torch.tensor(ids)))
    return texts


def build(args: argparse.Namespace, directory: Path, precision: str, load: bool = False) -> Model:
    """This process's part of the model, without values unless `load`."""
    parallel = ParallelConfig(tensor=args.tp, pipeline=args.pp)
    pickled = getattr(args, "allow_pickle", False)
    with together():
        keys: dict[str, Any] = {"precision": precision, "allow_pickle": pickled, "family": args.family}
        config = ModelConfig(model=str(directory), parallel=parallel, **keys)
        return build_model("convert", config, teacher_layout(parallel), torch.device("cpu"), load=load)


def shard_bytes(model: Model) -> int:
    return sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())


class Meter:
    """Time and memory from here on."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            pass  # then the peak includes what imports took
        self.before = self._status("VmRSS")

    def report(self, shard: int) -> None:
        """Prints each rank's peak. Collective."""
        ranks = all_gather((self._status("VmHWM") - self.before, shard))
        for rank, (peak, held) in enumerate(ranks):
            share = f" ({peak / held - 1:+.0%})" if held >= 2**25 else ""  # of a tiny shard it says nothing
            say(
                f"rank {rank}: shard {held / 2**20:.1f} MiB, peak {peak / 2**20:.1f} MiB{share}, "
                f"besides {self.before / 2**20:.0f} MiB of Python and libraries"
            )
        say(f"{time.monotonic() - self.began:.1f} s")

    @staticmethod
    def _status(key: str) -> int:
        """A memory figure of this process in bytes."""
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


def say(text: str) -> None:
    """Rank 0 speaks for all."""
    if is_rank_0():
        print(text, flush=True)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on rank 0's terminal; yields the function that advances it."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
