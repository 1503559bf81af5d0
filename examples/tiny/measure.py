"""Prints the accuracy of each model under models/ on the held-out prompts, with transformers alone.

python examples/tiny/measure.py [--models DIR ...] [--limit N]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import sentencepiece
import torch
from reasoning_gym import get_score_answer_fn
from transformers import Qwen3ForCausalLM

HERE = Path(__file__).parent
MAX_TOKENS = 400


@torch.no_grad()
def responses(directory: Path, prompts: list[str], sample: bool) -> list[str]:
    """One response to each prompt, cut after MAX_TOKENS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_id()] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    # top_k=0: sample from the whole distribution, as training does
    out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=sample, top_k=0)
    special = {tokenizer.pad_id(), tokenizer.eos_id()}
    return [tokenizer.decode([i for i in row[width:].tolist() if i not in special]) for row in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=sorted((HERE / "models").iterdir()))
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (HERE / "prompts" / "eval.jsonl").read_text().splitlines()][: args.limit]
    score = get_score_answer_fn("chain_sum")
    for directory in args.models:
        shares = []
        for sample in (False, True):
            torch.manual_seed(0)
            correct = 0
            for text, row in zip(responses(directory, [row["prompt"] for row in rows], sample), rows):
                boxed = re.findall(r"\\boxed\{([^}]*)\}", text)
                correct += bool(boxed) and score(boxed[-1], row) == 1.0
            shares.append(correct / len(rows))
        print(f"{directory.name}: greedy {shares[0]:.1%}, sampled {shares[1]:.1%}", flush=True)


if __name__ == "__main__":
    main()
