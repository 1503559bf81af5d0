"""tools/convert.py as its user runs it: round trips, verification, and every kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import LIMIT_S
from tests.models.tiny_families import VOCAB, make

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import convert  # noqa: E402
import convert_steps  # noqa: E402


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A tied bf16 Qwen3 in several files, with a sentencepiece tokenizer and a chat template."""
    directory = make("qwen3_tied", tmp_path_factory.mktemp("hf") / "model", torch.bfloat16, shard="20KB")
    words = iter(["To find how many apples are left, start with twelve (12 - 2) / 2 = 5."] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_prefix=str(directory / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def converted(hf) -> Path:
    out = hf.parent / "converted"
    assert convert.main(["import", "--hf", str(hf), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(hf, tmp_path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def shard_with(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def change(directory: Path, tensor: str, function) -> None:
    """Rewrites one file with `function(tensors)` applied to its dictionary."""
    file = shard_with(directory, tensor)
    held = load_file(file)
    function(held)
    save_file(held, file, {"format": "pt"})
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    places = {name: place for name, place in index["weight_map"].items() if place != file.name or name in held}
    index["weight_map"] = places | {name: file.name for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(directory: Path, **keys) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(capsys, out: Path | None, *argv: object) -> str:
    """Runs the tool, which must fail with one message and leave nothing behind; returns the message."""
    before = sorted(out.parent.iterdir()) if out else []
    capsys.readouterr()
    try:
        code = convert.main([str(arg) for arg in argv])
    except SystemExit as usage:
        code = usage.code
    error = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in error
    messages = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, error
    if out:
        assert sorted(out.parent.iterdir()) == before
    return messages[0]


def test_import_then_export_gives_the_input_back(hf, converted, tmp_path, capsys):
    capsys.readouterr()
    assert convert.main(["export", "--megatron", str(converted), "--out", str(tmp_path / "back")]) == 0
    assert "rank 0: shard 0.1 MiB, peak" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "back"), tensors(hf))
    for name in ("config.json", "generation_config.json", "tokenizer.model", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "back" / "megatron_opd.json").exists()


def test_export_writes_shards_that_transformers_reads(converted, hf, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "sharded"
    assert convert.main(["export", "--megatron", str(converted), "--out", str(out), "--max-shard-size", "30KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for file in out.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 30_000
    ids = torch.arange(9)[None]
    logits = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits for d in (hf, out)]
    assert torch.equal(*logits)


def test_mixed_dtypes_and_a_stored_tied_output_layer_come_back(copy, tmp_path):
    """fp32 norms and an lm_head.weight beside the embedding it is tied to; rope buffers are dropped."""

    def mix(held):
        held["model.norm.weight"] = held["model.norm.weight"].float() * 1.0001
        held["lm_head.weight"] = tensors(copy)["model.embed_tokens.weight"]
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(copy, "model.norm.weight", mix)
    wanted = tensors(copy)
    del wanted["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert convert.main(["import", "--hf", str(copy), "--out", str(tmp_path / "out")]) == 0
    assert convert.main(["export", "--megatron", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert_same(tensors(tmp_path / "back"), wanted)


def test_dtype_converts(hf, tmp_path):
    assert convert.main(["import", "--hf", str(hf), "--out", str(tmp_path / "fp32"), "--dtype", "fp32"]) == 0
    assert convert.main(["export", "--megatron", str(tmp_path / "fp32"), "--out", str(tmp_path / "back")]) == 0
    assert_same(tensors(tmp_path / "back"), {name: tensor.float() for name, tensor in tensors(hf).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_verify_agrees_on_random_and_real_text(hf, converted, capsys):
    capsys.readouterr()
    assert convert.main(["verify", "--hf", str(hf), "--megatron", str(converted)]) == 0
    out = capsys.readouterr().out
    assert "random tokens: 128 positions" in out and "real text: 128 positions" in out
    assert out.count("top-1 agreement 100.00%") == 2


def test_verify_finds_one_changed_value(copy, converted, capsys):
    def nudge(held):
        held["model.norm.weight"][3] += 0.25

    change(copy, "model.norm.weight", nudge)
    argv = ["verify", "--hf", str(copy), "--megatron", str(converted)]
    assert convert.main(argv) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert convert.main([*argv, "--tolerance", "1"]) == 0


def test_two_processes_convert_and_fail_together(hf, copy, tmp_path):
    """--tp 2 starts its processes; a file that only breaks while it is read ends both with one message."""
    run = {"capture_output": True, "text": True, "timeout": LIMIT_S, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    command = [sys.executable, str(TOOLS / "convert.py"), "import", "--tp", "2", "--out"]
    good = subprocess.run([*command, str(tmp_path / "good"), "--hf", str(hf)], **run)
    assert good.returncode == 0, good.stderr
    assert "rank 1: shard" in good.stdout
    assert convert.main(["export", "--megatron", str(tmp_path / "good"), "--out", str(tmp_path / "back")]) == 0
    assert_same(tensors(tmp_path / "back"), tensors(hf))

    change(copy, "model.norm.weight", lambda held: held.pop("model.norm.weight"))
    bad = subprocess.run([*command, str(tmp_path / "bad"), "--hf", str(copy)], **run)
    assert bad.returncode == 1
    assert bad.stderr.count("error: ") == 1 and "lacks 1 tensor(s)" in bad.stderr and "model.norm.weight" in bad.stderr
    assert not list(tmp_path.glob("*bad*"))


def test_unknown_architecture(copy, tmp_path, capsys):
    edit_config(copy, model_type="mamba", architectures=["MambaForCausalLM"])
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert "MambaForCausalLM" in message and "llama, qwen2, qwen3, qwen3_moe" in message


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_variants_that_would_compute_something_else(copy, tmp_path, capsys, keys, words):
    edit_config(copy, **keys)
    assert words in refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")


def test_missing_tensor(copy, tmp_path, capsys):
    change(copy, "model.norm.weight", lambda held: held.pop("model.norm.weight"))
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert str(copy) in message and "lacks 1 tensor(s)" in message and "model.norm.weight" in message


def test_extra_tensor(copy, tmp_path, capsys):
    change(copy, "model.norm.weight", lambda held: held.update({"model.layers.0.extra.weight": torch.ones(2)}))
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert shard_with(copy, "model.norm.weight").name in message and "model.layers.0.extra.weight" in message


def test_wrong_shape(copy, tmp_path, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    change(copy, name, lambda held: held.update({name: held[name][:-1].clone()}))
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert shard_with(copy, name).name in message and f"{name} has shape (47, 32)" in message and "(48, 32)" in message


def test_wrong_dtype(copy, tmp_path, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    change(copy, name, lambda held: held.update({name: held[name].to(torch.float8_e4m3fn)}))
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert f"{name} has dtype F8_E4M3" in message and shard_with(copy, name).name in message
    assert "--dtype" in refused(capsys, None, "import", "--hf", copy, "--out", tmp_path / "out", "--dtype", "int8")


def test_truncated_shard(copy, tmp_path, capsys):
    file = shard_with(copy, "model.norm.weight")
    os.truncate(file, file.stat().st_size - 10)
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert file.name in message and "truncated: tensor model." in message
    os.truncate(file, 20)
    assert "truncated" in refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")


def test_missing_files(copy, tmp_path, capsys):
    argv = ("import", "--hf", copy, "--out", tmp_path / "out")
    file = shard_with(copy, "model.norm.weight")
    file.unlink()
    assert file.name in refused(capsys, tmp_path / "out", *argv)
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(capsys, tmp_path / "out", *argv)
    (copy / "config.json").unlink()
    assert "config.json" in refused(capsys, tmp_path / "out", *argv)


def test_output_directory_in_use(hf, converted, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    for argv in (("import", "--hf", hf), ("export", "--megatron", converted)):
        assert "already in use" in refused(capsys, tmp_path / "out", *argv, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_empty_output_directory_is_welcome(hf, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert.main(["import", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 0


def test_no_space_left_before_it_starts(hf, converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_steps.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    for argv in (("import", "--hf", hf), ("export", "--megatron", converted)):
        assert "no space left" in refused(capsys, tmp_path / "out", *argv, "--out", tmp_path / "out")


def test_no_space_left_while_it_writes(hf, converted, tmp_path, capsys, monkeypatch):
    """Another job takes the space in between: the tensors' bytes do not fit any more."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        message = refused(capsys, tmp_path / "out", "import", "--hf", hf, "--out", tmp_path / "out")
    assert "No space left on device" in message and str(tmp_path / "out") in message
    written = []

    def fills_up(file, data, offset):
        written.append(len(data))
        return full() if sum(written) > 50_000 else len(data)

    monkeypatch.setattr("os.pwrite", fills_up)
    message = refused(capsys, tmp_path / "out", "export", "--megatron", converted, "--out", tmp_path / "out")
    assert "No space left on device" in message and str(tmp_path / "out") in message


def test_pickled_parameters_only_on_demand(hf, tmp_path, capsys):
    pickled = tmp_path / "in" / "pickled"
    pickled.mkdir(parents=True)
    shutil.copy(hf / "config.json", pickled)
    torch.save(tensors(hf), pickled / "pytorch_model.bin")
    argv = ("import", "--hf", pickled, "--out", tmp_path / "out")
    message = refused(capsys, tmp_path / "out", *argv)
    assert "can run any code" in message and "--allow-pickle" in message
    assert convert.main([*map(str, argv), "--allow-pickle"]) == 0
    assert convert.main(["export", "--megatron", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert_same(tensors(tmp_path / "back"), tensors(hf))


def test_code_in_the_directory_never_runs(copy, tmp_path):
    edit_config(copy, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert convert.main(["import", "--hf", str(copy), "--out", str(tmp_path / "out")]) == 0
    assert convert.main(["verify", "--hf", str(copy), "--megatron", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()


def test_tied_output_layer_that_differs(copy, tmp_path, capsys):
    change(copy, "model.norm.weight", lambda held: held.update({"lm_head.weight": torch.ones(VOCAB, 32).bfloat16()}))
    message = refused(capsys, tmp_path / "out", "import", "--hf", copy, "--out", tmp_path / "out")
    assert "lm_head.weight differs" in message and "tie_word_embeddings" in message


def test_converted_directories_that_are_broken(converted, tmp_path, capsys):
    broken = Path(shutil.copytree(converted, tmp_path / "in" / "broken"))
    argv = ("export", "--megatron", broken, "--out", tmp_path / "out")
    data = broken / "megatron" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    assert "cannot be loaded" in refused(capsys, tmp_path / "out", *argv)
    data.unlink()
    assert "__0_0.distcp" in refused(capsys, tmp_path / "out", *argv)
    (broken / "megatron_opd.json").unlink()
    assert "interrupted conversion" in refused(capsys, tmp_path / "out", *argv)


def test_the_wrong_kind_of_directory(hf, converted, tmp_path, capsys):
    assert "not a converted" in refused(capsys, None, "export", "--megatron", hf, "--out", tmp_path / "out")
    assert "already converted" in refused(capsys, None, "import", "--hf", converted, "--out", tmp_path / "out")
    assert "1 processes were started" in refused_as_rank_0(capsys, hf, tmp_path / "out")


def refused_as_rank_0(capsys, hf: Path, out: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        return refused(capsys, None, "import", "--hf", hf, "--out", out, "--tp", 3)
