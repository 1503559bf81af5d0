"""YAML and overrides as people write them: read as they are meant, or refused with line, key and remedy."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from megatron_opd.config import Config, ConfigError, dump_config, load_config, parse_config

MODELS = {"student": {"model": "/s"}, "teacher": {"model": "/t"}}


def read(folder: Path, text: str = "", *overrides: str) -> Config:
    path = folder / "run.yaml"
    head = "" if "student:" in text else "student: {model: s}\nteacher: {model: t}\n"
    head += "" if "data:" in text else "data: {prompts: p.jsonl}\n"
    path.write_text(head + text, encoding="utf-8")
    return load_config(path, list(overrides))


def problems(folder: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "NO", "y", "true", "2026-01-01", "010", "1:30", "1e-6", "5", "0x1F"]
)
def test_text_is_what_is_written(tmp_path: Path, word: str) -> None:
    text = f"data: {{prompts: {word}, suffix: {word}, system: {word}, prompt_key: {word}}}"
    for config in (read(tmp_path, text), read(tmp_path, "", f"data.suffix={word}", f"data.system={word}")):
        assert (config.data.suffix, config.data.system) == (word, word)
    assert read(tmp_path, text).data.prompts == str(tmp_path / word)
    assert load_config(_dumped(tmp_path, read(tmp_path, text))) == read(tmp_path, text)


def _dumped(folder: Path, config: Config) -> Path:
    path = folder / "dump.yaml"
    path.write_text(dump_config(config))
    return path


def test_null_is_null_where_a_key_may_be_null(tmp_path: Path) -> None:
    assert read(tmp_path, "data: {prompts: p, system: null}").data.system is None
    assert read(tmp_path, "", "data.system=null", "data.tokenizer=~").data.system is None
    assert read(tmp_path, "", "data.system='null'").data.system == "null"
    assert "data.suffix: Input should be a valid string" in problems(tmp_path, "data: {prompts: p, suffix: }")


def test_switches_and_numbers_are_read_by_their_key(tmp_path: Path) -> None:
    train = "train: {lr: 1e-6, min_lr: 0, steps: 1e3, distributed_optimizer: on, seed: -5}\n"
    config = read(tmp_path, train + "prune: {preset: off, w_drop: .5}")
    assert (config.train.lr, config.train.steps, config.train.distributed_optimizer) == (1e-6, 1000, True)
    assert (config.prune.preset, config.prune.w_drop, config.train.seed) == ("off", 0.5, -5)
    assert read(tmp_path, "", "train.lr=1e-4", "data.shuffle=no").data.shuffle is False


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("010", "train.steps: 010 may mean 10 or 8 (octal)"),
        ("1:30", "train.steps: 1:30 is a number to the base of 60"),
        ("2026-01-01", "train.steps: 2026-01-01 may be a date; a number is needed"),
        ("on", "train.steps: needs a number, and on is none"),
        ("true", "train.steps: needs a number, and true is none"),
        ("0b11", "train.steps: 0b11: binary numbers are not read here; write 3"),
        ("1.5", "train.steps: Input should be a valid integer"),
        ("9" * 5000, "train.steps: 9999"),
        ("9" * 12, "train.steps: Input should be less than or equal to 2147483647"),
        (".inf", "train.steps: Input should be a finite number"),
        ("!!python/name:os.system", "the tag !!python/name:os.system is not known here"),
        ("!mine 5", "the tag !mine is not known here"),
    ],
)
def test_numbers_that_readers_of_yaml_disagree_on_are_refused(tmp_path: Path, value: str, says: str) -> None:
    assert says in problems(tmp_path, f"train:\n  steps: {value}\n")
    assert says in problems(tmp_path, "", f"train.steps={value}")


@pytest.mark.parametrize("key", ["train.seed", "eval.seed", "data.seed"])
def test_seeds_have_64_bits(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, "", f"{key}={2**63 - 1}")
    for seed in (2**63, 2**64, -(2**63), 10**30):
        assert f"{key}: Input should be" in problems(tmp_path, "", f"{key}={seed}")


@pytest.mark.parametrize("key", ["train.lr", "train.clip_grad", "rollout.temperature", "train.watchdog_s"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    assert key in problems(tmp_path, "", f"{key}={value}")


def test_options_of_ones_own_part_have_no_type_to_read_by(tmp_path: Path) -> None:
    (tmp_path / "mine_of_reading.py").write_text("class Loss: pass\n")
    loss = "loss: {kind: 'megatron_opd.losses:Loss', options: {alpha: 1e-6, name: text, many: [1, 2.5]}}"
    assert read(tmp_path, loss).loss.options == {"alpha": 1e-6, "name": "text", "many": [1, 2.5]}
    for value, says in (
        ("off", "off may be text or true/false"),
        ("010", "010 may mean 10 or 8"),
        ("2026-01-01", 'write "2026-01-01"'),
    ):
        found = problems(tmp_path, f"loss: {{kind: 'megatron_opd.losses:Loss', options: {{alpha: {value}}}}}")
        assert f"loss.options.alpha: {says}" in found or says in found
        assert says in problems(tmp_path, "", "loss.kind=megatron_opd.losses:Loss", f"loss.options.alpha={value}")


def test_a_key_may_be_written_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "train:\n  steps: 5\n  lr: 0.1\n  steps: 6\neval: {every: 1}\neval: {every: 2}\n")
    assert "run.yaml, line 7: train.steps: is written twice, also in line 5; keep one" in found
    assert "line 9: eval: is written twice, also in line 8" in found
    assert "override 'train.lr=2': train.lr is given twice, 'train.lr=1'" in problems(
        tmp_path, "", "train.lr=1", "train.lr=2"
    )
    assert "replaces what came before it" in problems(tmp_path, "", "train.lr=1", "train={steps: 5}")
    assert "loss.options.a: is written twice" in problems(tmp_path, "loss: {kind: 'm:L', options: {a: 1, a: 2}}")
    assert "train.lr: is written twice" in problems(tmp_path, "", "train={lr: 1, lr: 2}")
    assert "answers_per_prompt is the old name" in problems(
        tmp_path, "train: {answers_per_prompt: 2, responses_per_prompt: 3}"
    )


def test_the_same_override_again_and_a_later_layer_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path, "", "train={steps: 7, lr: 1}", "train.steps=8").train.steps == 8
    assert read(tmp_path, "", "train.steps=8", "train.steps=8").train.steps == 8
    read(tmp_path)
    assert load_config(tmp_path / "run.yaml", ["train.steps=8"], ["train.steps=9"]).train.steps == 9


@pytest.mark.parametrize(
    "text",
    [
        "Put the answer after #### at the end.",
        "@end",
        "[x",
        "%x",
        "*bold* please",
        "a: b",
        "'quoted' at first",
        '"a" # b',
        "{x} ",
        "- item",
        "\n\nThink.",
        "| or >",
        "key=value",
    ],
)
def test_an_override_of_text_is_the_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "", f"data.suffix={text}").data.suffix == text


def test_quotes_around_the_whole_are_yamls(tmp_path: Path) -> None:
    assert read(tmp_path, "", r'data.suffix="\n\nThink."').data.suffix == "\n\nThink."
    assert read(tmp_path, "", "data.suffix='it''s #1'").data.suffix == "it's #1"


def test_what_a_comment_would_cut_off_an_override_is_refused(tmp_path: Path) -> None:
    for item, cut in (
        ("train.steps=5 # of 10", "# of 10"),
        ("rollout.vllm.servers=[http://a:1] #x", "#x"),
        ("student.parallel={tensor: 1} # x", "# x"),
    ):
        assert f"drops {cut!r}" in problems(tmp_path, "", item)


@pytest.mark.parametrize("item", ["train.steps=[5", "train.steps=@", "train=*x", "eval.sets=[{name: a", "train.lr=&a"])
def test_a_value_that_is_no_yaml_is_named(tmp_path: Path, item: str) -> None:
    assert "override" in problems(tmp_path, "", item) or "train.lr" in problems(tmp_path, "", item)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"# entra\xeenement\n", "it is not UTF-8 (byte 7: 0xee)"),
        (b"train: {steps: 5\n", "not valid YAML"),
        (b"a: \x07", "not valid YAML"),
        (b"- a\n- b\n", "found a list"),
        (b"text", "found one value"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"[" * 20_000, "nested too deeply"),
        (b"train: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"train: &a {steps: *a}\n", "contains itself"),
        (b'data: {prompts: "a\\0b"}\n', "holds a null byte"),
        (b'data: {prompts: a, suffix: "\\ud83d"}\n', "half of a character"),
        (b"? [a]\n: b\n", "a key must be a word"),
        (b"", "required key is missing"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 10)) for n in range(97, 104)),
            "more than 100000 values",
        ),
    ],
)
def test_files_that_are_no_config_say_why(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert says in str(caught.value)


def test_merged_mappings_are_read(tmp_path: Path) -> None:
    text = "train: {<<: {steps: 5, lr: 1}, steps: 6}\nrollout: &r {top_p: 0.5}\n"
    config = read(tmp_path, text)
    assert (config.train.steps, config.train.lr, config.rollout.top_p) == (6, 1.0, 0.5)


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    text = "train: {steps: 010, lr: 1, lr: 2, seed: 1e30}\nprune: {signal: no_such_module_of_mine:Signal, k: 0}\n"
    found = problems(tmp_path, text, "trian.steps=5", "train.min_lr=1 # 2", "data.verifier=json:nothing")
    for part in (
        "train.steps: 010",
        "train.lr: is written twice",
        "train.seed",
        "there is no module no_such_module_of_mine",
        "prune.k",
        "trian.steps: unknown key" if "trian.steps" in found else "trian: unknown key",
        "drops '# 2'",
        "data.verifier: ",
        "defines no nothing",
    ):
        assert part in found, part
    assert found.startswith("9 problem(s) in the config:")


@pytest.mark.parametrize(
    "key",
    [
        "prune.signal",
        "prune.token_weighting",
        "loss.kind",
        "rollout.engine",
        "data.verifier",
        "data.prompts",
        "teacher.family",
    ],
)
def test_a_part_of_ones_own_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "parts_of_mine.py").write_text(
        "import os\nraise SystemExit('it was run')\nif os:\n    class Thing: pass\nother = 1\n"
    )
    (tmp_path / "broken_of_mine.py").write_text("def f(:\n")
    assert read(tmp_path, "", f"{key}=parts_of_mine:Thing")
    for name, says in (
        ("no_such_module:Thing", "there is no module no_such_module; it must be installed or lie on PYTHONPATH"),
        ("no_such_package.inner:Thing", "cannot import no_such_package.inner"),
        ("parts_of_mine:Thingy", "parts_of_mine.py defines no Thingy; did you mean Thing?"),
        ("broken_of_mine:f", "broken_of_mine.py is not valid Python"),
    ):
        found = problems(tmp_path, "", f"{key}={name}")
        assert f"{key}: " in found and says in found


def test_old_names_work_in_files_and_overrides_and_are_reported(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="rollout.mode is called rollout.vllm.mode now"):
        config = read(tmp_path, "rollout: {engine: vllm, mode: server, servers: ['http://a:1'], vllm: {tensor: 2}}")
    assert (config.rollout.vllm.mode, config.rollout.vllm.tensor) == ("server", 2)
    with pytest.warns(FutureWarning, match="eval.sets.0.answers_per_prompt is called eval.sets.0.responses_per_prompt"):
        text = "rollout: {vllm: {cpu_cache_mb: 64}}\neval: {sets: [{name: a, prompts: x, responses_per_prompt: 2}]}"
        config = read(tmp_path, text, "eval.sets.0.answers_per_prompt=3", "rollout.cpu_cache_mb=128")
    assert config.eval.sets[0].responses_per_prompt == 3 and config.rollout.vllm.cpu_cache_mb == 128
    with pytest.warns(FutureWarning, match="tensor is called vllm.tensor"):
        values = {**MODELS, "data": {"prompts": "/p"}, "rollout": {"tensor": 4}}
        assert parse_config(values).rollout.vllm.tensor == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_a_dump_survives_text_that_yaml_would_read_as_something_else(tmp_path: Path) -> None:
    words = ["on", "1e-6", "010", "2026-01-01", "null", "0o7", "1:30", "", " x ", "#", "é\n"]
    config = parse_config(
        {
            **MODELS,
            "data": {"prompts": "/p"},
            "loss": {"kind": "m:L", "options": {f"k{i}": w for i, w in enumerate(words)}},
        }
    )
    path = _dumped(tmp_path, config)
    text = path.read_text().replace("m:L", "megatron_opd.losses:Loss")
    path.write_text(text)
    assert list(load_config(path).loss.options.values()) == words
    assert list(yaml.safe_load(text)["loss"]["options"].values()) == words
