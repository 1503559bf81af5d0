"""Whole evaluations with an engine that writes down its answers instead of thinking of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import DataConfig, EvalConfig
from megatron_opd.data.sources import DataError
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import ConfigError
from megatron_opd.evaluation.run import EvaluationError, evaluate, load_eval_sets
from megatron_opd.rollout.base import RolloutEngine
from megatron_opd.types import END_EOS, END_LENGTH, Rollout
from tests.data.make_tokenizers import make_hugging_face, make_sentencepiece
from tests.distributed import run_distributed

OWN = "tests.evaluation.own_verifiers:misbehave"


class Scripted(RolloutEngine):
    """Answers "N" or "N+1" to the prompt "N", by a coin that (seed, index) decides, as a real engine's sampler does."""

    def __init__(self, tokenizer, die_after: int | None = None, version: int = 7):
        self.tokenizer, self.die_after, self.policy_version = tokenizer, die_after, version
        self.asked: list[tuple[str, int]] = []
        self.samplings: list = []

    def generate(self, requests, sampling, watch=None, segment=128):
        if self.die_after is not None and len(self.asked) >= self.die_after:
            raise KeyboardInterrupt
        self.samplings.append(sampling)
        rollouts = []
        for r in requests:
            self.asked.append((r.prompt.text, r.index))
            right = random.Random(f"{sampling.seed}/{r.index}").random() < 0.5
            text = r.prompt.answer if right else f"{r.prompt.answer}1"
            ids = [*self.tokenizer.encode(text), 1]
            cut = len(ids) > sampling.max_tokens
            ids = torch.tensor(ids[: sampling.max_tokens])
            reason, none = END_LENGTH if cut else END_EOS, torch.zeros(len(ids), 0)
            rollouts.append(
                Rollout(r.prompt, r.index, ids, torch.zeros(len(ids)), none.long(), none, reason, self.policy_version)
            )
        return rollouts

    def update_parameters(self, named_parameters, version):
        self.policy_version = version

    def probe(self, tokens):
        raise NotImplementedError("an evaluation asks for answers alone")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_sentencepiece(tmp_path_factory.mktemp("sp")))


def prompts_file(folder: Path, name: str = "p.jsonl", answers=tuple(range(10, 16))) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": f"{a}?", "answer": str(a)}) + "\n" for a in answers))
    return str(path)


def setup(tokenizer, prompts: str, chunk=6, save=True, **changes):
    one = {
        "name": "easy",
        "prompts": prompts,
        "verifier": "exact",
        "responses_per_prompt": 3,
        "max_tokens": 50,
        **changes,
    }
    settings = EvalConfig.model_validate({"sets": [one], "chunk_responses": chunk, "save_responses": save, "seed": 5})
    return settings, load_eval_sets(settings, DataConfig(prompts=prompts, template="none"), tokenizer)


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_numbers_and_the_file_for_reading(tokenizer, tmp_path):
    settings, sets = setup(tokenizer, prompts_file(tmp_path), temperature=0.5, top_p=0.9)
    engine = Scripted(tokenizer)
    result = evaluate(engine, sets, tokenizer, settings, tmp_path / "eval", 20, True)
    right = [[random.Random(f"5/{i * 3 + s}").random() < 0.5 for s in range(3)] for i in range(6)]
    expected = sum(map(sum, right)) / 18
    assert result["accuracy"] == {"easy": pytest.approx(expected)}
    numbers = result["sets"]["easy"]
    assert numbers["avg@3"] == pytest.approx(expected)
    assert numbers["pass@3"] == pytest.approx(sum(map(any, right)) / 6)
    assert numbers["maj@3"] == pytest.approx(sum(sum(r) >= 2 for r in right) / 6)
    assert numbers["avg@3_low"] <= expected <= numbers["avg@3_high"]
    assert (numbers["truncated"], numbers["too_long"], numbers["verifier_problems"]) == (0, 0, 0)
    assert result["problems"] == {}
    used = engine.samplings[0]
    assert (used.max_tokens, used.temperature, used.top_p, used.seed, used.top_logprobs) == (50, 0.5, 0.9, 5, 0)
    lines = records(tmp_path / "eval" / "easy-step20.jsonl")
    assert len(lines) == 18 and numbers["length_mean"] == sum(x["length"] for x in lines) / 18
    for line in lines:
        assert line["correct"] == right[line["uid"]][line["sample"]] == (line["response"] == line["answer"])
        assert (line["prompt"], line["policy_version"]) == (f"{line['answer']}?", 7)
        assert (line["extracted"], line["truncated"], line["problem"]) == (line["response"], False, None)
    assert json.loads((tmp_path / "eval" / "step20.json").read_text()) == {"step": 20, **result}


@pytest.mark.parametrize("lost", ["easy-step1.jsonl", "step1.json"])
def test_files_that_cannot_be_written_end_no_training(lost, tokenizer, tmp_path):
    settings, sets = setup(tokenizer, prompts_file(tmp_path))
    (tmp_path / "eval" / lost).mkdir(parents=True)
    whole = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "whole", 1, True)
    with pytest.raises(EvaluationError, match="directory"):  # of `eval`, whose result the files are
        evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "eval", 1, True)
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "eval", 1, True, files_may_fail=True)
    assert result["accuracy"] == whole["accuracy"] and whole["warnings"] == []
    (warning,) = result["warnings"]
    assert str(tmp_path / "eval" / lost) in warning and "directory" in warning


def test_truncation_is_reported(tokenizer, tmp_path):
    settings, sets = setup(tokenizer, prompts_file(tmp_path), max_tokens=2)
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 0, True)
    assert result["sets"]["easy"]["truncated"] == 1.0 and result["sets"]["easy"]["length_mean"] == 2


def test_several_sets(tokenizer, tmp_path):
    one = {"prompts": prompts_file(tmp_path), "verifier": "exact"}
    many = [{"name": n, **one, "responses_per_prompt": k} for n, k in (("a", 1), ("b", 2))]
    settings = EvalConfig.model_validate({"sets": many})
    sets = load_eval_sets(settings, DataConfig(prompts="x", template="none"), tokenizer)
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 0, True)
    assert list(result["accuracy"]) == ["a", "b"] and "avg@1" in result["sets"]["a"] and "avg@2" in result["sets"]["b"]


@pytest.mark.parametrize("damage", ["none", "half a line", "no newline", "broken line"])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(tokenizer, tmp_path, damage):
    settings, sets = setup(tokenizer, prompts_file(tmp_path))
    whole = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "whole", 1, True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(tokenizer, die_after=12), sets, tokenizer, settings, tmp_path / "cut", 1, True)
    path = tmp_path / "cut" / "easy-step1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    if damage == "half a line":
        lines[-1] = lines[-1][:30]
    elif damage == "no newline":
        lines[-1] = lines[-1][:-1]
    elif damage == "broken line":
        lines[4] = b"\x00\x00\n"
    path.write_bytes(b"".join(lines))
    engine = Scripted(tokenizer)
    assert evaluate(engine, sets, tokenizer, settings, tmp_path / "cut", 1, True) == whole
    assert len(engine.asked) == (6 if damage == "none" else 7)
    assert {r["key"]: r for r in records(path)} == {
        r["key"]: r for r in records(tmp_path / "whole" / "easy-step1.jsonl")
    }
    assert len(records(path)) == 18
    again = Scripted(tokenizer)
    assert evaluate(again, sets, tokenizer, settings, tmp_path / "cut", 1, True) == whole
    assert again.asked == []


def test_answers_of_other_settings_are_not_taken(tokenizer, tmp_path):
    prompts = prompts_file(tmp_path)
    settings, sets = setup(tokenizer, prompts)
    evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 1, True)
    path = tmp_path / "easy-step1.jsonl"

    def asked(parameters="", version=7, **changes):
        own_settings, own_sets = setup(tokenizer, changes.pop("prompts", prompts), **changes)
        engine = Scripted(tokenizer, version=version)
        result = evaluate(engine, own_sets, tokenizer, own_settings, tmp_path, 1, True, parameters)
        assert len(records(path)) == len({r["key"] for r in records(path)})
        replaced = result["sets"]["easy"]["replaced"]
        said = any("earlier responses of other parameters" in note for note in result["notes"].get("easy", ()))
        assert said is (replaced > 0)
        return len(engine.asked), replaced

    assert asked() == (0, 0)
    assert asked(limit=2) == (0, 12) and len(records(path)) == 6  # a part of the same
    assert len(records(tmp_path / "easy-step1.old.jsonl")) == 18
    assert asked() == (12, 0)
    assert asked(temperature=0.9) == (18, 18)
    old = records(tmp_path / "easy-step1.old2.jsonl")
    assert len(old) == 18 and not {r["key"] for r in old} & {r["key"] for r in records(path)}
    assert asked(temperature=0.9, max_tokens=49) == (18, 18)
    assert asked(temperature=0.9, max_tokens=49, version=8) == (0, 0)  # the same parameters at another step's number
    assert asked(temperature=0.9, max_tokens=49, parameters="others") == (18, 18)
    changed = prompts_file(tmp_path, "q.jsonl", (10, 11, 99, 13, 14, 15))
    assert asked(temperature=0.9, max_tokens=49, parameters="others", prompts=changed) == (3, 3)
    assert len(list(tmp_path.glob("easy-step1.old*.jsonl"))) == 5


def test_saved_responses_are_judged_anew(tokenizer, tmp_path):
    """A verifier or a reference answer may have been mended: the responses stay, what they are worth does not."""
    settings, sets = setup(tokenizer, prompts_file(tmp_path))
    first = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 1, True, "p")
    path = tmp_path / "easy-step1.jsonl"
    before = records(path)
    settings, sets = setup(tokenizer, prompts_file(tmp_path), verifier="tests.evaluation.own_verifiers:never")
    engine = Scripted(tokenizer)
    second = evaluate(engine, sets, tokenizer, settings, tmp_path, 1, True, "p")
    right = sum(r["correct"] for r in before)
    assert engine.asked == [] and first["accuracy"]["easy"] > 0 == second["accuracy"]["easy"]
    assert [r["response"] for r in records(path)] == [r["response"] for r in before]
    assert not any(r["correct"] for r in records(path))
    assert (second["sets"]["easy"]["verdicts_changed"], second["sets"]["easy"]["replaced"]) == (right, 0)
    assert second["notes"]["easy"] == [f"{right} earlier verdicts changed; the old ones are kept as NAME.old.jsonl"]
    assert records(tmp_path / "easy-step1.old.jsonl") == before
    assert json.loads((tmp_path / "step1.old.json").read_text())["accuracy"] == first["accuracy"]
    lines = [json.loads(line) for line in Path(sets[0].config.prompts).read_text().splitlines()]
    for line in lines:  # other references to the same prompts
        line["answer"] += "1"
    Path(sets[0].config.prompts).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings, sets = setup(tokenizer, sets[0].config.prompts)
    third = evaluate(engine, sets, tokenizer, settings, tmp_path, 1, True, "p")
    assert engine.asked == [] and third["accuracy"]["easy"] == pytest.approx(1 - first["accuracy"]["easy"])


def test_what_is_left_out_is_among_the_numbers(tokenizer, tmp_path):
    path = Path(prompts_file(tmp_path))
    path.write_text(json.dumps({"prompt": "1" * 5000, "answer": "1"}) + "\n" + path.read_text())
    settings, sets = setup(tokenizer, str(path), limit=2)
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 1, True)
    numbers = result["sets"]["easy"]
    assert (numbers["prompts"], numbers["too_long"], numbers["beyond_limit"]) == (2, 1, 4)
    assert result["notes"]["easy"] == [
        "1 prompts left out: longer than data.max_prompt_tokens",
        "4 prompts left out: behind the set's limit",
    ]


def test_without_saving_nothing_but_the_summary_is_written(tokenizer, tmp_path):
    settings, sets = setup(tokenizer, prompts_file(tmp_path), save=False)
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "eval", 1, True)
    assert result["sets"]["easy"]["responses"] == 18
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["step1.json"]


def test_a_verifier_that_hangs_or_crashes_is_reported_and_the_rest_counts(tmp_path):
    tokenizer = load_tokenizer(make_hugging_face(tmp_path / "tokenizer"))  # spells any word

    class Fixed(Scripted):
        def generate(self, requests, sampling, watch=None, segment=128):
            rollouts = super().generate(requests, sampling)
            for r in rollouts:
                r.tokens = torch.tensor([*self.tokenizer.encode(r.prompt.answer), 2])
            return rollouts

    path = prompts_file(tmp_path, answers=("raise", "is", "die", "a", "hang"))
    settings, sets = setup(tokenizer, path, verifier=OWN, responses_per_prompt=1)
    settings.verifier_timeout_s = 3
    result = evaluate(Fixed(tokenizer), sets, tokenizer, settings, tmp_path, 1, True)
    assert result["accuracy"]["easy"] == pytest.approx(2 / 5)
    assert result["sets"]["easy"]["verifier_problems"] == 3
    assert result["problems"]["easy"] == [
        "prompt 0, sample 0: the verifier failed: ZeroDivisionError: on purpose",
        "prompt 2, sample 0: the verifier's process died (exit code 3)",
        "prompt 4, sample 0: the verifier took longer than 3 s",
    ]
    assert "on purpose" in records(tmp_path / "easy-step1.jsonl")[0]["problem"]


def test_errors_say_what_is_wrong(tokenizer, tmp_path):
    settings, sets = setup(tokenizer, prompts_file(tmp_path))
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(EvaluationError, match="file"):
        evaluate(Scripted(tokenizer), sets, tokenizer, settings, blocked, 1, True)
    with pytest.raises(ConfigError, match="eval.sets: verifier no.such:f cannot start: ModuleNotFoundError"):
        setup(tokenizer, prompts_file(tmp_path), verifier="no.such:f")
    with pytest.raises(ValueError, match="is_writer must be true on rank 0"):
        evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path, 1, False)

    class Old(Scripted):
        def generate(self, *arguments):
            rollouts = super().generate(*arguments)
            rollouts[2].policy_version = 6
            return rollouts

    with pytest.raises(EvaluationError, match=r"policy versions \[6\], the engine holds 7"):
        evaluate(Old(tokenizer), sets, tokenizer, settings, tmp_path / "old", 1, True)
    with pytest.raises(DataError, match="eval set easy: .*none.jsonl: no such file"):
        setup(tokenizer, str(tmp_path / "none.jsonl"))


def _on_two_ranks(rank: int, world_size: int, folder: str, tokenizer_folder: str):
    tokenizer = load_tokenizer(tokenizer_folder)
    settings, sets = setup(tokenizer, str(Path(folder) / "p.jsonl"))
    out = Path(folder) / "ranks"
    result = evaluate(Scripted(tokenizer), sets, tokenizer, settings, out, 1, rank == 0)
    engine = Scripted(tokenizer)
    again = evaluate(engine, sets, tokenizer, settings, out, 1, rank == 0)
    failure = ""
    try:
        evaluate(Scripted(tokenizer), sets, tokenizer, settings, Path(folder) / "p.jsonl", 1, rank == 0)
    except EvaluationError as error:
        failure = str(error)
    dist.barrier()
    return result, again, len(engine.asked), failure


def test_every_rank_gets_the_result_and_the_failure(tokenizer, tmp_path):
    prompts = prompts_file(tmp_path)
    settings, sets = setup(tokenizer, prompts)
    alone = evaluate(Scripted(tokenizer), sets, tokenizer, settings, tmp_path / "alone", 1, True)
    ranks = run_distributed(2, _on_two_ranks, str(tmp_path), str(Path(tokenizer.path).parent))
    for result, again, asked, failure in ranks:
        assert result == again == alone
        assert asked == 0
        assert "p.jsonl" in failure
