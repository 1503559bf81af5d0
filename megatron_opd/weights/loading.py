"""Parameters from a model directory into the shards of a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import is_rank_0, together
from megatron_opd.weights.bridge import ModelBridge
from megatron_opd.weights.converted import is_converted, load_converted
from megatron_opd.weights.hf_files import HEAD, HFTensors, ModelFileError, check_tied
from megatron_opd.weights.parameters import (
    COLUMNS,
    VOCAB,
    WHOLE,
    Parameter,
    fill,
    hf_names,
    hf_shapes,
    local_parameters,
    tensor_group,
    writable,
)

_READ_BYTES = 16 << 20  # tensors are read in blocks of rows of about this size where no merging needs more


def load_parameters(model: Model, directory: str | Path, allow_pickle: bool = False) -> None:
    """Fills the model from a Hugging Face directory or from one made by `tools/convert.py import`.

    Collective over the world. Raises ModelFileError on every rank when one has a problem.
    """
    if is_converted(directory):
        load_converted(model, directory)
    else:
        load_hf(model, directory, allow_pickle)


@torch.no_grad()
def load_hf(
    model: Model, directory: str | Path, allow_pickle: bool = False, progress: Callable[[int], None] | None = None
) -> None:
    """Fills the model from safetensors, tensor by tensor; each rank reads the rows that it keeps, and nothing is sent.

    Values are converted to each parameter's dtype as they come; rows of the padded vocabulary become zeros. Besides the
    model itself about two of its matrices are held at a time. `progress` is called with the bytes of each parameter as
    it is filled. Collective over the world.

    Raises ModelFileError, naming file and tensor, on every rank: a missing or extra tensor (rope buffers
    and an equal copy of a tied output layer may be there), a wrong shape or dtype, a broken file.
    """
    names = hf_names(model)
    with together(), HFTensors(directory, allow_pickle) as files:
        check_names(files, names, model.bridge)
        if model.bridge.tied and is_rank_0():
            check_tied(files)
        for parameter, tensor in local_parameters(model):
            target = writable(parameter, tensor)
            _load(parameter, target, files, model)
            fill(tensor, target)
            if progress is not None:
                progress(parameter.local_bytes)


def check_names(files: HFTensors, names: set[str], bridge: ModelBridge) -> None:
    """Raises ModelFileError where a directory's tensors are not exactly those of the model."""
    stored = {name for name in files.tensors if not name.endswith("rotary_emb.inv_freq")}  # a buffer, computed
    if bridge.tied:
        stored.discard(HEAD)  # a copy of the embedding; transformers ignores it too
    for problem, wrong in (("lacks", names - stored), ("has extra", stored - names)):
        if wrong:
            some = ", ".join(sorted(wrong)[:3]) + (", ..." if len(wrong) > 3 else "")
            where = files.directory
            if problem == "has extra":
                where = files.tensors[min(wrong)].file
            model = f"a {bridge.hf_config.model_type} of this config.json"
            raise ModelFileError(f"{where}: {problem} {len(wrong)} tensor(s) for {model}: {some}")


def _load(parameter: Parameter, tensor: Tensor, files: HFTensors, model: Model) -> None:
    """This rank's part of one parameter into `tensor`."""
    group, bridge = tensor_group(parameter, model), model.bridge
    size, rank = group.size(), group.rank()
    names, shapes = bridge.hf_names(parameter.name), hf_shapes(parameter, model)
    for name, shape in zip(names, shapes, strict=True):
        info = files.tensors[name]
        if info.shape != shape:
            raise ModelFileError(f"{info.file}: tensor {name} has shape {info.shape}, config.json asks for {shape}")
    if parameter.split == WHOLE:
        tensor.copy_(files.read(names[0]))
    elif parameter.split == VOCAB:
        first = rank * tensor.shape[0]
        count = max(0, min(tensor.shape[0], bridge.vocab_size - first))
        for start, stop in _blocks(count, tensor[:1].nbytes):
            tensor[start:stop].copy_(files.read(names[0], (first + start, first + stop)))
        tensor[count:].zero_()
    elif parameter.split == COLUMNS:
        rows, columns = tensor.shape
        for start, stop in _blocks(rows, tensor[:1].nbytes * size):
            block = files.read(names[0], (start, stop))
            tensor[start:stop].copy_(block[:, rank * columns : (rank + 1) * columns])
    else:
        slices = []
        for name, (rows, *_) in zip(names, shapes, strict=True):
            slices.append(files.read(name, (rank * rows // size, (rank + 1) * rows // size)).to(parameter.dtype))
        tensor.copy_(bridge.to_megatron(parameter.name, slices))


def _blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _READ_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
