"""Writes prompts/train.jsonl and prompts/eval.jsonl from reasoning-gym. They share no expression with each other, nor
with the problems that the models are trained on.

    python examples/tiny/make_prompts.py

Each line: `prompt` (plain text; the answer follows it directly), `answer`, `source`, and in `metadata` reasoning-gym's
own metadata and question, which with the answer are what the data set's `score_answer` needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from task import TRAIN_SEED, TRAIN_SIZE, Problem, problems

TRAIN_PROMPTS, EVAL_PROMPTS = 1200, 200


def line(problem: Problem) -> str:
    """One JSON line for one problem."""
    record = {
        "prompt": problem.prompt,
        "answer": problem.entry["answer"],
        "source": "reasoning_gym:chain_sum",
        "metadata": {**problem.entry["metadata"], "question": problem.entry["question"]},
    }
    return json.dumps(record) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prompts")
    out = parser.parse_args().out
    seen = {problem.terms for problem in problems(TRAIN_SEED, TRAIN_SIZE)}
    for name, seed, size in (("eval", 2, EVAL_PROMPTS), ("train", 3, TRAIN_PROMPTS)):
        kept = [problem for problem in problems(seed, size + 100) if problem.terms not in seen][:size]
        seen.update(problem.terms for problem in kept)
        (out / f"{name}.jsonl").write_text("".join(line(problem) for problem in kept))
        print(f"{name}: {len(kept)} prompts")


if __name__ == "__main__":
    main()
