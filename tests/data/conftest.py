"""Tokenizers and prompts files that the tests of this folder share."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.config import DataConfig
from megatron_opd.data.tokenizer import load_tokenizer
from tests.data.make_tokenizers import make_hugging_face, make_sentencepiece

GOOD = {"prompt": "1", "answer": "2"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return load_tokenizer(make_hugging_face(tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    return load_tokenizer(make_sentencepiece(tmp_path_factory.mktemp("sp")))


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="p.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return str(path)

    return to_file


def plain(path, **changes):
    return DataConfig(prompts=path, template="none", **changes)
