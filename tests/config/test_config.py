"""The config refuses what it must, names the key and the remedy, and reads presets, overrides and paths."""

from pathlib import Path

import pytest
import yaml

from megatron_opd.config import Config, ConfigError, all_keys, dump_config, load_config, parse_config

MINIMAL = {"student": {"model": "/s"}, "teacher": {"model": "/t"}, "data": {"prompts": "/p.jsonl"}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("student: {model: s}\nteacher: {model: /abs/t}\ndata: {prompts: p.jsonl}\n")
    return path


def read(**values) -> Config:
    return parse_config({**MINIMAL, **values})


def test_defaults_are_the_published_settings() -> None:
    config = read()
    prune, budget = config.prune, config.prune.budget
    assert (prune.k, prune.threshold, prune.w_drop, prune.w_base, prune.cut) == (16, 0.7, 0.01, 0.5, "none")
    assert (budget.initial, budget.minimum, budget.maximum) == (2048, 1024, 12288)
    assert (budget.step, budget.margin, budget.hit_ratio, budget.patience) == (100, 100, 0.1, 3)
    assert (config.train.lr, config.train.prompts_per_step, config.train.responses_per_prompt) == (1e-6, 64, 4)
    assert config.loss.kind == "topk_reverse_kl"


def test_presets_fill_in_what_is_not_given() -> None:
    in_flight = read(prune={"preset": "in_flight", "w_drop": 0.2}).prune
    assert in_flight.in_flight and in_flight.cut == "reliability" and in_flight.w_base == 0.0
    assert in_flight.w_drop == 0.2
    assert read(prune={"preset": "off"}).prune.signal == "none"
    assert read(prune=yaml.safe_load("{preset: off}")).prune.preset == "off"  # YAML reads it as false


def test_every_key_is_documented() -> None:
    assert [key for key, text in all_keys().items() if not text] == []


def test_all_problems_are_reported_at_once_with_the_nearest_key(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.stpes=5", "prune.thresold=0.5", "prune.w_drop=7", "rollout.vllm.mode=server"])
    text = str(caught.value)
    assert "train.stpes: unknown key; did you mean train.steps?" in text
    assert "did you mean prune.threshold?" in text
    assert "prune.w_drop" in text and "got 7" in text
    assert "mode: server needs engine: vllm" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"model": "/s", "parallel": {"sequence": True}}}, "sequence: true needs tensor > 1"),
        ({"student": {"model": "/s", "fp8": "hybrid", "precision": "fp32"}}, "fp8: hybrid needs precision: bf16"),
        ({"teacher": {"model": "/t", "parallel": {"pipeline": 2, "virtual_pipeline": 2}}}, "virtual_pipeline is for"),
        ({"prune": {"cut": "reliability"}}, "set w_base: 0 or cut: none"),
        ({"prune": {"preset": "off", "in_flight": True}}, "in_flight: true needs a signal"),
        ({"prune": {"after_drift": "grpo"}}, "after_drift: grpo needs in_flight: true"),
        ({"prune": {"budget": {"initial": 10}}}, "initial: 10 must lie between"),
        ({"loss": {"kind": "forward_kl"}}, "set score.mode: fused"),
        ({"train": {"min_lr": 1.0}}, "min_lr: 1.0 is above lr"),
        ({"eval": {"sets": [{"name": "a", "prompts": "/x"}, {"name": "a", "prompts": "/y"}]}}, "names must differ"),
    ],
)
def test_contradictions_are_refused_with_a_remedy(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**values)


def test_fused_scoring_needs_equal_layouts() -> None:
    with pytest.raises(ConfigError, match="student.parallel and teacher.parallel to be equal"):
        read(score={"mode": "fused"}, student={"model": "/s", "parallel": {"tensor": 2}})


def test_fused_scoring_excludes_an_offloaded_teacher() -> None:
    with pytest.raises(ConfigError, match="set teacher.offload: false"):
        read(score={"mode": "fused"}, teacher={"model": "/t", "offload": True})


def test_expert_groups_that_would_wait_for_each_other_are_refused() -> None:
    expert = {"model": "/m", "parallel": {"expert": 2}}
    with pytest.raises(ConfigError, match="student.parallel.expert: 2 .* set rollout.engine: vllm"):
        read(student=expert, rollout={"engine": "megatron"})
    with pytest.raises(ConfigError, match="teacher.parallel.expert: 2 .* set prune.in_flight: false"):
        read(teacher=expert, prune={"preset": "in_flight"})
    read(student=expert, teacher=expert, rollout={"engine": "vllm"})


def test_paths_of_a_file_are_relative_to_it_and_those_of_overrides_are_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(file, [])
    assert config.student.model == str(tmp_path / "s")
    assert config.teacher.model == "/abs/t"
    assert load_config(file, [f"data.prompts={elsewhere}/q.jsonl"]).data.prompts == str(elsewhere / "q.jsonl")


def test_overrides_reach_into_lists_and_keep_their_types(file: Path) -> None:
    file.write_text(file.read_text() + "eval: {sets: [{name: a, prompts: x.jsonl}]}\n")
    config = load_config(file, ["eval.sets.0.limit=8", "train.lr=1e-4", "student.parallel={tensor: 2, sequence: true}"])
    assert config.eval.sets[0].limit == 8
    assert config.train.lr == 1e-4
    assert config.student.parallel.sequence
    for wrong in ("eval.sets.3.limit=1", "student.model.x=1", "no_equals_sign"):
        with pytest.raises(ConfigError, match="override"):
            load_config(file, [wrong])


def test_a_dump_reads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = read(prune={"preset": "in_flight"}, student={"model": "/s", "parallel": {"tensor": 2, "sequence": True}})
    path = tmp_path / "dump.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("student: {model: s\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": {"model": "/t", "context": "{prompt}"}}, "teacher.context"),
        ({"teacher": {"model": "/t", "system": "x"}, "data": {"prompts": "/p", "template": "none"}}, "teacher.system"),
        ({"teacher": {"model": "/t", "context_key": "x"}, "score": {"mode": "fused"}}, "set score.mode: separate"),
    ],
)
def test_a_teachers_own_prompts_are_refused_where_they_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**values)
