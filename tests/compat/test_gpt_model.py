"""What compat/gpt_model.py says of GPTModel, on tiny models in the installed Megatron-Core."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_opd.compat import gpt_model
from megatron_opd.models.packed import PackedRotary
from tests.distributed import run_distributed
from tests.layouts import teacher_model
from tests.models.tiny_families import make

TOKENS = torch.arange(3, 15)
WIDTH = 32  # hidden size of the tiny models


def pieces(rank: int, world_size: int, directory: str, layout: str) -> dict[str, object]:
    """Every function of the module on this rank's chunk; tensors of the last stage stay there."""
    model = teacher_model(directory, layout)
    (chunk,) = model.chunks
    row, padded = model.row([len(TOKENS)])
    tokens = torch.nn.functional.pad(TOKENS, (0, padded - len(TOKENS)))
    found: dict[str, object] = {
        "ends": (gpt_model.is_first(chunk), gpt_model.is_last(chunk)),
        "layers": gpt_model.layer_numbers(chunk),
        "names": sorted(n for n, _ in chunk.named_parameters() if "layers" not in n),
        "heads": len(gpt_model.output_layers(model.chunks)),
        "rotary": isinstance(chunk.rotary_pos_emb, PackedRotary),
    }
    gpt_model.renew_fp8_copies(chunk)  # nothing to do without FP8, and no error
    if not gpt_model.is_first(chunk):
        hidden = torch.randn(padded, 1, WIDTH, generator=torch.Generator().manual_seed(0))
        gpt_model.set_input(chunk, hidden)
        found["input"] = torch.equal(gpt_model.given_input(chunk), hidden)
    with torch.no_grad():
        out = gpt_model.run_chunk(chunk, tokens, row)
        found["shape"] = tuple(out.shape)
        if gpt_model.is_last(chunk):
            found |= last_chunk(model.chunks, chunk, tokens, row, out)
    return found


def last_chunk(chunks, chunk, tokens, row, logits: Tensor) -> dict[str, object]:
    head = gpt_model.head_parameter(chunk)
    tied = chunk.share_embeddings_and_output_weights
    with gpt_model.without_output_layer(chunks):
        hidden = gpt_model.run_chunk(chunk, tokens, row)
    with gpt_model.head_input(chunks, lambda states: states[2:5]):
        some = gpt_model.run_chunk(chunk, tokens, row)
    again = gpt_model.run_chunk(chunk, tokens, row)
    return {
        "head": tuple(head.shape),
        "head is the embedding": tied and head is chunk.embedding.word_embeddings.weight,
        "hidden": tuple(hidden.shape),
        "head of hidden": float((hidden[0] @ head.T - logits[0]).abs().max()),
        "some": float((some[0] - logits[0, 2:5]).abs().max()),
        "as before": torch.equal(again, logits),
    }


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: str(make(family, root / family)) for family in ("qwen3", "qwen3_tied")}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied"])
def test_a_whole_model(family, directories):
    (found,) = run_distributed(1, pieces, directories[family], "tp1")
    assert found["ends"] == (True, True) and found["layers"] == [0, 1, 2, 3] and found["heads"] == 1
    names = [gpt_model.FINAL_NORM, gpt_model.EMBEDDING] + ([] if family == "qwen3_tied" else [gpt_model.HEAD])
    assert found["names"] == sorted(names)
    assert found["rotary"]
    assert (
        found["shape"] == (1, 12, 128) and found["head"] == (128, WIDTH) and found["hidden"] == (1, 12, WIDTH)
    )  # 101 ids in a shard of a multiple of 64
    assert found["head is the embedding"] == (family == "qwen3_tied")
    assert found["head of hidden"] < 1e-5 and found["some"] < 1e-5
    assert found["as before"], "the output layer is as it was behind both blocks"


def test_two_stages(directories):
    first, last = run_distributed(2, pieces, directories["qwen3"], "pp2")
    assert first["ends"] == (True, False) and last["ends"] == (False, True)
    assert first["layers"] == [0, 1] and last["layers"] == [2, 3], "global numbers"
    assert first["names"] == [gpt_model.EMBEDDING] and first["heads"] == 0
    assert first["shape"] == (12, 1, WIDTH) and last["shape"] == (1, 12, 128)
    assert last["input"] and last["head of hidden"] < 1e-5
