"""Verdicts of each verifier, and what a hanging or crashing one does to the others: nothing."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading

import pytest
import torch

from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.evaluation import worker
from megatron_opd.evaluation.verifiers import (
    Case,
    Verdict,
    VerifierError,
    VerifierPool,
    reference_problems,
    response_text,
)
from megatron_opd.types import Prompt, Rollout
from tests.data.make_tokenizers import make_hugging_face
from tests.evaluation import verifier_table

OWN = "tests.evaluation.own_verifiers:misbehave"


@pytest.fixture(scope="module")
def math():
    with VerifierPool("math") as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is \\boxed{42}.", "42", True),
        ("so it is \\boxed{42}.", "43", False),
        ("so it is 42.", "42", True),  # nothing is marked: the whole final part is read
        ("so it is 42.", "43", False),
        ("", "42", False),
        ("first \\boxed{1}, no: \\boxed{2}", "2", True),
        ("first \\boxed{1}, no: \\boxed{2}", "1", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}", True),
        ("\\boxed{\\sqrt{18}}", "3\\sqrt{2}", True),
        ("\\boxed{033}", "33", True),
        ("\\boxed{1,234}", "1234", True),
        ("\\boxed{(1, 2)}", "$(1,2)$", True),
        ("\\boxed{(2, 1)}", "(1,2)", False),
        ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", True),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("\\boxed{7}", "\\boxed{7}", True),  # a reference that brings its box
        ("\\boxed{12", "12", False),  # cut by the length limit
        ("\\boxed{\\frac{}{}}", "12", False),
        ("\\boxed{}", "12", False),
    ],
)
def test_math(math, response, answer, right):
    (verdict,) = math.score([Case(response, answer)])
    assert verdict.correct is right and verdict.problem is None


def test_math_says_where_the_reference_answer_is_unreadable(math):
    (verdict,) = math.score([Case("\\boxed{1}", "\\frac{}{}")])
    assert not verdict.correct and "cannot read the reference answer" in verdict.problem


def test_math_on_an_expression_that_hangs_counts_that_one_wrong():
    cases = [Case(f"\\boxed{{{i}}}", str(i)) for i in range(6)]
    cases[2] = Case("\\boxed{9^{9^{9^{9}}}}", "5")
    with VerifierPool("math", timeout_s=3, workers=2) as pool:
        verdicts = pool.score(cases)
    assert [v.correct for v in verdicts] == [True, True, False, True, True, True]
    assert verdicts[2].problem == "the verifier took longer than 3 s"


def test_reasoning_gym_uses_the_data_sets_own_scorer():
    import reasoning_gym

    sets = ("chain_sum", "countdown", "spell_backward", "maze", "mini_sudoku")
    entries = [(name, reasoning_gym.create_dataset(name, seed=1, size=1)[0]) for name in sets]
    cases, kinds = [], ("<answer>{}</answer>", "thinking</think>{}", "wrong {}x")
    for name, entry in entries:
        metadata = {**entry["metadata"], "question": entry["question"]}
        answer = str(entry["answer"])
        if name == "countdown":
            metadata = entry  # some files keep the whole entry
        cases += [Case(kind.format(answer), entry["answer"], metadata, f"reasoning_gym:{name}") for kind in kinds]
    with VerifierPool("reasoning_gym") as pool:
        verdicts = pool.score(cases)
        unknown, boxed = pool.score(
            [Case("1", "1", source="reasoning_gym:none"), Case("\\boxed{4}", "4", source="chain_sum")]
        )
    assert [v.correct for v in verdicts] == [True, True, False] * len(sets)
    assert all(v.problem is None for v in verdicts)
    assert "'none' not registered" in unknown.problem and not unknown.correct
    assert boxed.correct


def test_partial_credit_is_a_score_but_no_right_answer():
    with VerifierPool("reasoning_gym", workers=1) as pool:
        (verdict,) = pool.score([Case("it is 42, I think", "42", source="chain_sum")])
    assert 0 < verdict.score < 1 and not verdict.correct


def test_exact():
    cases = [Case("<answer> a b </answer>", "a b"), Case("a b", "a b "), Case("a  b", "a b"), Case("\\boxed{x}", "x")]
    with VerifierPool("exact", workers=1) as pool:
        verdicts = pool.score(cases)
    assert [v.correct for v in verdicts] == [True, True, False, True]
    assert [v.extracted for v in verdicts] == ["a b", "a b", "a  b", "x"]


def test_a_misbehaving_verifier_costs_its_response_and_no_other():
    deeds = ["hang", "spin", "raise", "die", "crash", "exit", "eat memory", "two"]
    cases = [Case(x, "ok") for deed in deeds for x in ("ok", deed)] + [Case("ok", "ok"), Case("print", "print")]
    with VerifierPool(OWN, timeout_s=3, workers=2) as pool:
        verdicts = pool.score(cases)
        assert pool.score([Case("ok", "ok"), Case("no", "ok")]) == [Verdict(1.0, "ok"), Verdict(0.0, "no")]
    assert all(v == Verdict(1.0, "ok") for v in verdicts[:-1:2])
    assert verdicts[-1].correct  # what it prints does not disturb
    problems = [v.problem for v in verdicts[1:-1:2]]
    assert problems[:6] == [
        "the verifier took longer than 3 s",
        "the verifier took longer than 3 s",
        "the verifier failed: ZeroDivisionError: on purpose",
        "the verifier's process died (exit code 3)",
        "the verifier's process died (signal 6)",
        "the verifier's process died (exit code 4)",
    ]
    assert "MemoryError" in problems[6]
    assert problems[7] == "the verifier failed: ValueError: the verifier returned 2.0, not a score from 0 to 1"
    assert not any(v.correct for v in verdicts[1:-1:2])


def test_reference_answers_that_cannot_be_verified_are_found(math):
    def prompts(*answers):
        return [Prompt(i, "?", [], a) for i, a in enumerate(answers)]

    (finding,) = reference_problems(prompts("42", "\\frac12", "\\frac{}{}", None), math)
    assert finding.startswith("prompt 2: ") and "cannot read the reference answer" in finding
    with VerifierPool(OWN, workers=1) as pool:
        assert reference_problems(prompts("<answer>a</answer>"), pool) == [
            "prompt 0, reference answer '<answer>a</answer>': it does not count as right itself (score 0)"
        ]
    with VerifierPool("exact", workers=1) as pool:
        assert reference_problems(prompts("a", "b c"), pool) == []


def test_metadata_that_cannot_be_sent_counts_its_answer_wrong():
    with VerifierPool("exact", workers=1) as pool:
        bad, good = pool.score([Case("1", "1", {"x": lambda: 0}), Case("1", "1")])
    assert "cannot be sent to the verifier" in bad.problem and good.correct


def test_a_verifier_that_cannot_start_is_an_error():
    for name, message in ((OWN + "_not", "has no attribute"), ("no_such_module:f", "No module named 'no_such_module'")):
        with (
            VerifierPool(name) as pool,
            pytest.raises(VerifierError, match=f"verifier {name} cannot start: .*{message}"),
        ):
            pool.score([Case("1", "1")])


def test_it_works_off_the_main_thread(math):
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.extend(math.score([Case("\\boxed{0.50}", "\\frac12")])))
    thread.start()
    thread.join()
    assert verdicts[0].correct


def test_a_worker_killed_between_calls_is_replaced():
    with VerifierPool("exact", workers=1) as pool:
        assert pool.score([Case("1", "1")])[0].correct
        process = pool._workers[0]._process
        process.kill()
        process.wait()
        assert pool.score([Case("1", "1")])[0].correct


def test_close_ends_the_workers_and_a_busy_one_ends_without_its_parent():
    pool = VerifierPool("exact", workers=2)
    pool.score([Case("1", "1")] * 8)
    processes = [w._process for w in pool._workers if w._process]
    pool.close()
    assert processes and all(p.poll() is not None for p in processes)
    script = (
        "import os, signal, sys, threading\n"
        "from megatron_opd.evaluation.verifiers import *\n"
        f"pool = VerifierPool({OWN!r}, timeout_s=600, workers=1)\n"
        "pool.score([Case('ok', 'ok')])\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "pool._workers[0]._connection.send(('score', 0.5, 'spin', '', {}, ''))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    try:
        orphan = os.pidfd_open(int(parent.stdout))
    except ProcessLookupError:
        return  # gone already
    ended, _, _ = select.select([orphan], [], [], 300)
    os.close(orphan)
    assert ended


def test_the_worker_imports_neither_torch_nor_this_package():
    code = (
        f"import runpy, sys; sys.path.insert(0, ''); m = runpy.run_path({worker.__file__!r}, None, 'w');"
        "m['load_math'](); m['load_reasoning_gym']();"
        "print(sorted(x for x in ('torch', 'megatron', 'megatron_opd', 'transformers') if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed {a}", "a"),
        ("\\fbox{1} then \\boxed{2", "1"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("boxed{1}", None),
    ],
)
def test_boxed(text, inside):
    assert worker.boxed(text) == inside


def test_the_table_of_hand_decided_pairs():
    """Nothing wrong is accepted, and right answers are read in every convention."""
    table = verifier_table.pairs()
    verdicts = verifier_table.judge()
    precision, recall = verifier_table.rates(verdicts, table)
    wrong = [p for said, p in zip(verdicts, table, strict=True) if said and not p["right"]]
    assert len(table) >= 300 and precision == 1, wrong
    assert recall > 0.96, [p for said, p in zip(verdicts, table, strict=True) if p["right"] and not said]


THOUGHT = "Perhaps \\boxed{41}. No."


@pytest.mark.parametrize(
    ("prompt", "response", "right"),
    [
        ("...assistant\n<think>\n", f"{THOUGHT}</think>\n\\boxed{{42}}", True),
        ("...assistant\n<think>\n", "It is \\boxed{42}, I think, but let me", False),  # cut in its thinking
        ("...assistant\n<think>", "<think>It is \\boxed{42}", False),  # the model writes the marker again
        ("...assistant\n<think>\n\n</think>\n\n", "\\boxed{42}", True),  # thinking switched off
        ("Write <think> before you think.\nassistant\n", "\\boxed{42}", True),
        ("[INST] 6*7? [/INST][THINK]", f"{THOUGHT}[/THINK]\\boxed{{42}}", True),
        ("[INST] 6*7? [/INST][THINK]", "\\boxed{42}", False),
        ("<|start|>assistant<|channel|>analysis<|message|>", "\\boxed{42}", False),
        (
            "<|start|>assistant<|channel|>analysis<|message|>",
            f"{THOUGHT}<|channel|>final<|message|>\\boxed{{42}}",
            True,
        ),
        ("assistant\n<thought>\n", "\\boxed{42}", False),
    ],
)
def test_thinking_that_the_prompt_opens(math, prompt, response, right):
    (verdict,) = math.score([Case.of(Prompt(0, prompt, [], "42"), response)])
    assert verdict.correct is right and verdict.problem is None


def test_every_verifier_of_ours_knows_the_thinking_that_the_prompt_opens():
    prompt = Prompt(0, "<think>\n", [], "4", "reasoning_gym:chain_sum", {"source_dataset": "chain_sum"})
    for name in ("exact", "reasoning_gym"):
        with VerifierPool(name, workers=1) as pool:
            finished, cut = pool.score([Case.of(prompt, text) for text in ("2+2</think>4", "4")])
        assert finished.correct and not cut.correct
    with VerifierPool(OWN, workers=1) as pool:  # a verifier of one's own gets what was generated
        assert pool.score([Case.of(Prompt(0, "<think>\n", [], "ok"), "ok")])[0].correct


def test_marks_of_thinking_that_are_control_pieces_are_read(tmp_path, math):
    tokenizer = load_tokenizer(make_hugging_face(tmp_path, extra=("[THINK]", "[/THINK]", "<|tool|>")))
    text = f"[THINK]{THOUGHT}[/THINK]<|tool|>\\boxed{{42}}<|im_end|>"
    tokens, none = torch.tensor(tokenizer.encode(text)), torch.zeros(0)
    rollout = Rollout(Prompt(0, "", [], "42"), 0, tokens, none, none, none, "eos", 0)
    read = response_text(rollout, tokenizer)
    assert read == f"[THINK]{THOUGHT}[/THINK]\\boxed{{42}}"
    assert tokenizer.decode(tokens.tolist()) == f"{THOUGHT}\\boxed{{42}}"
    cut = rollout.__class__(rollout.prompt, 0, tokens[: len(tokens) // 2], none, none, none, "length", 0)
    verdicts = math.score([Case.of(r.prompt, response_text(r, tokenizer)) for r in (rollout, cut)])
    assert [v.correct for v in verdicts] == [True, False]
