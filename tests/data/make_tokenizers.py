"""Small tokenizers made on the spot, in the layouts that users bring."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["What is 1+2? Reason step by step.", "Solve 34 - 5 = 29, put the answer in a box.", "user assistant system"] * 3

# Shaped like Qwen3's: thinking is switched off by an empty block.
THINKING_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}thinking:"


def make_sentencepiece(
    folder: Path, symbols: str = "0123456789", bos: bool = True, config: dict | None = None, size: int = 80
) -> Path:
    """A directory with tokenizer.model alone (and config.json where given); returns the directory."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        minloglevel=2,
        user_defined_symbols=list(symbols),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=3 if bos else -1,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_hugging_face(
    folder: Path,
    eos: str = "<|im_end|>",
    generation_eos: int | list[int] | None = None,
    template: str | None = THINKING_TEMPLATE,
    extra: tuple[str, ...] = (),
    bos: str | None = None,
    text: list[str] = TEXT,
) -> Path:
    """A directory as `save_pretrained` leaves it, byte-level BPE as Qwen's; returns the directory."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", bos_token=bos, chat_template=template
    )
    fast.save_pretrained(folder)
    if generation_eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return folder
