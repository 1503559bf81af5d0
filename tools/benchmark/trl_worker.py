"""TRL's DistillationTrainer as `benchmark.py train` runs it: one step for every line read from standard input.

Runs in an environment of its own that has TRL. One argument: a JSON file with student, teacher, pad_id, eos_id, vocab,
prompts (token ids, one list a row), rows_per_step, tokens, lr, seed and threads. Rank 0 writes one line of JSON a step,
marked by MARK, since the libraries write to standard output, too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings

MARK = "benchmark: "


def main() -> None:
    settings = json.load(open(sys.argv[1]))
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    # Prompts travel as token ids, written as numbers: every id is the "word" of its own number.
    pad, eos = str(settings["pad_id"]), str(settings["eos_id"])
    words = Tokenizer(models.WordLevel({str(i): i for i in range(settings["vocab"])}, unk_token=pad))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=eos, padding_side="left")
    data = Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in settings["prompts"]]})

    def load(path: str):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)

    class Counting(DistillationTrainer):
        generated, generate_s = 0, 0.0

        def _generate_single_turn(self, *args, **kwargs):
            started = time.perf_counter()
            completions = super()._generate_single_turn(*args, **kwargs)
            self.generate_s += time.perf_counter() - started
            self.generated += sum(len(ids) for ids in completions)
            return completions

    class Commands(TrainerCallback):
        """Waits for the next line before a step, reports after it."""

        def on_step_begin(self, args, state, control, **kwargs):
            go = [sys.stdin.readline().strip() == "go" if rank == 0 else False]
            if processes > 1:
                dist.broadcast_object_list(go, 0)
            if not go[0]:
                os._exit(0)
            trainer.generated, trainer.generate_s = 0, 0.0
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if processes > 1:
                dist.barrier()
            seconds = time.perf_counter() - self.started
            tokens = torch.tensor(trainer.generated)
            if processes > 1:
                dist.all_reduce(tokens)
            say({"seconds": seconds, "tokens": int(tokens), "generate_s": trainer.generate_s})

    def say(report: dict) -> None:
        if rank == 0:
            print(MARK + json.dumps(report), flush=True)

    cpu = settings["device"] == "cpu"
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings["rows_per_step"] // processes,
        max_completion_length=settings["tokens"],
        max_steps=10**6,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        seed=settings["seed"],
        temperature=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=cpu,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
        ddp_backend="gloo" if cpu else None,
    )
    trainer = Counting(
        model=load(settings["student"]),
        teacher_model=load(settings["teacher"]),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Commands()],
    )
    say({"ready": True, "trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__})
    trainer.train()


if __name__ == "__main__":
    main()
