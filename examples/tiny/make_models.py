"""Trains everything under models/ from scratch: the tokenizer, the teacher and the two students.

    python examples/tiny/make_models.py --out examples/tiny/models

About 20 minutes on two idle cores: 600 and 450 steps of 1.0 to 1.2 s, as measured with one thread a model. The weights
in the tree were made so, by these functions with these seeds, both models at once, except that their parameters were
also rounded to bfloat16 after every hundredth step: a new run comes close to them and not to the same bits.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import time
from pathlib import Path

import sentencepiece
import torch
from task import FILLER, LABELS, TRAIN_SEED, TRAIN_SIZE, Problem, clean_answer, problems, sloppy_answer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNK, VOCAB = 0, 1, 2, 96
TEACHER_STEPS, CLOSE_STEP, DRIFT_STEPS = 600, 500, 450
SLOPPY = {"forget_plus": 0.4, "forget_minus": 0.65, "ramble": 0.06}  # how careless the texts of student_drift are


def make_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece BPE of 96 pieces: digits, labels and signs stand alone, the rest is learned from the words."""
    words = ["Solve", "Steps"] * 20 + [f"{filler},\n" for filler in FILLER] * 20
    symbols = [*"0123456789", *LABELS.replace("A", ""), "A", *"+-:=,>\n", "\\boxed{", "}"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def qwen3(hidden: int, layers: int, intermediate: int, heads: int, tied: bool) -> Qwen3ForCausalLM:
    """A Qwen3 with heads of 32 and two key-value heads, in float32 while it trains."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        attention_dropout=0.0,
    )
    return Qwen3ForCausalLM(config).to(torch.float32)


class Texts:
    """An endless stream of training batches; a writer turns a problem into a response and whether it ends."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, pool: list[Problem], writer, seed: int):
        self.tokenizer, self.pool, self.writer, self.rng = tokenizer, pool, writer, random.Random(seed)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels [size, S]; labels are -100 on the prompt and on padding."""
        rows = []
        for problem in self.rng.sample(self.pool, size):
            response, ends = self.writer(problem, self.rng)
            prompt = self.tokenizer.encode(problem.prompt)
            rows.append((len(prompt), prompt + self.tokenizer.encode(response) + [EOS] * ends))
        width = max(len(ids) for _, ids in rows)
        ids = torch.tensor([row + [PAD] * (width - len(row)) for _, row in rows])
        labels = ids.clone()
        for i, (start, row) in enumerate(rows):
            labels[i, :start] = -100
            labels[i, len(row) :] = -100
        return ids, labels


def train(
    model: Qwen3ForCausalLM, texts: Texts, steps: int, lr: float, batch: int, name: str, snapshots: dict | None = None
) -> None:
    """Muon for the matrices, AdamW for the rest, decay over the last third; `snapshots` maps a step to a callback."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    began = time.time()
    for step in range(1, steps + 1):
        rate = lr * min(1.0, step / 30, 3 * (steps - step + 1) / steps)
        ids, labels = texts.batch(batch)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == 1:
            print(f"{name} step {step}/{steps} loss {loss.item():.4f} {time.time() - began:.0f}s", flush=True)
        if snapshots and step in snapshots:
            snapshots[step]()


def save(model: Qwen3ForCausalLM, tokenizer: Path, out: Path) -> None:
    """Hugging Face format, bfloat16, with the shared tokenizer beside it."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=1.0)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)  # a copy: training goes on from unrounded parameters
    if out / "tokenizer.model" != tokenizer:
        (out / "tokenizer.model").write_bytes(tokenizer.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument(
        "--only", choices=["teacher", "student_drift"], help="train this one alone (the tokenizer must exist)"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out
    shared = out / "teacher" / "tokenizer.model"
    if args.only:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(shared))
    else:
        shared.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(shared)
    pool = problems(TRAIN_SEED, TRAIN_SIZE)

    if args.only != "student_drift":
        torch.manual_seed(0)
        teacher = qwen3(hidden=96, layers=4, intermediate=192, heads=4, tied=False)
        texts = Texts(tokenizer, pool, lambda problem, rng: (clean_answer(problem), True), seed=5)
        close = {CLOSE_STEP: lambda: save(teacher, shared, out / "student_close")}
        train(teacher, texts, TEACHER_STEPS, lr=4e-3, batch=16, name="teacher", snapshots=close)
        save(teacher, shared, out / "teacher")

    if args.only != "teacher":
        torch.manual_seed(1)
        student = qwen3(hidden=128, layers=2, intermediate=256, heads=4, tied=True)
        texts = Texts(tokenizer, pool, lambda problem, rng: sloppy_answer(problem, rng, **SLOPPY), seed=5)
        train(student, texts, DRIFT_STEPS, lr=4e-3, batch=16, name="student_drift")
        save(student, shared, out / "student_drift")


if __name__ == "__main__":
    main()
