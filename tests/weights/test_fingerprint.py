"""The fingerprint of a model's parameters: the same in every layout, another one for any other value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_opd.weights import fingerprint
from megatron_opd.weights.fingerprint import checksum, parameters_fingerprint
from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, student_model
from tests.models.tiny_families import make

WORLDS = {1: ("tp1",), 2: ("tp1", "tp2", "pp2", "cp2"), 4: ("tp2_pp2",)}


def of_layouts(rank: int, world_size: int, folder: Path) -> list[str]:
    words = []
    for layout in WORLDS[world_size]:
        with student_model(folder, layout) as model:
            words.append(parameters_fingerprint(model, bucket_bytes=1 << 13))
    with student_model(folder, WORLDS[world_size][0]) as model:
        with torch.no_grad():  # the last bit of one value
            values = next(model.chunks[-1].parameters()).reshape(-1)
            values[0] = torch.nextafter(values[0], torch.tensor(torch.inf))
        words.append(parameters_fingerprint(model))
    return words


def test_every_layout_gives_the_same_word(tmp_path: Path) -> None:
    make("qwen3", tmp_path)
    assert set().union(*WORLDS.values()) <= set(LAYOUTS)
    plain, changed = set(), set()
    for world_size in WORLDS:
        ranks = run_distributed(world_size, of_layouts, tmp_path)
        assert all(words == ranks[0] for words in ranks)
        plain |= set(ranks[0][:-1])
        changed.add(ranks[0][-1])
    assert len(plain) == 1 and not plain & changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_values_and_their_places_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.linspace(-2, 2, 97).to(dtype)
    swapped = values.clone().view(torch.uint8).view(97, -1)
    swapped[[3, 90]] = swapped[[90, 3]]
    whole = checksum(values)
    assert whole != checksum(swapped.view(-1).view(dtype)) and whole != checksum(values[:96])
    assert checksum(torch.zeros(4, dtype=dtype)) != checksum(torch.zeros(5, dtype=dtype))
    monkeypatch.setattr(fingerprint, "CHUNK", 10)
    assert checksum(values) == whole
