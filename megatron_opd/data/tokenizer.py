"""Hugging Face tokenizers and sentencepiece `.model` files behind one small interface."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_opd.config.data import TEMPLATE_DATE
from megatron_opd.errors import InputError

HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
Message = dict[str, str]  # {"role": ..., "content": ...}


class TokenizerError(InputError):
    """A tokenizer cannot be used, or two that must agree do not."""


class Tokenizer(ABC):
    """Text to ids and back; ids at or above `vocab_size` are the model's padding and mean nothing."""

    path: str
    vocab_size: int
    """Number of real ids, the largest with a piece plus one; the model's own (padded) vocabulary may be larger."""
    bos_id: int | None
    eos_ids: frozenset[int]
    """Every id that ends a response: the model's generation_config.json (else config.json) and the tokenizer's own."""
    eos_source: str
    """Where `eos_ids` come from, in words, for the log."""
    pad_id: int
    chat_template: str | None
    writes_date = False
    """Whether a chat so far had a date in it."""

    @abstractmethod
    def encode(self, text: str, start: bool = False) -> list[int]:
        """Ids of the text alone; `start` puts the BOS in front where this tokenizer's convention has one."""

    @abstractmethod
    def decode(self, ids: list[int], keep: str = "") -> str:
        """The text of the ids, without control pieces such as EOS, apart from those that occur in `keep`."""

    @property
    def terminators(self) -> frozenset[int]:
        """Every id with which the model may end a response: `eos_ids`, and what its chat template ends a turn with."""
        return self.eos_ids

    @abstractmethod
    def pieces(self) -> list[str]:
        """The piece of each id, [vocab_size]; "" where an id has none."""

    @abstractmethod
    def _encoding_rules(self) -> str:
        """What else decides how text is split (merges, scores, normalisation), as text."""

    def chat(self, messages: list[Message], thinking: bool | None = None, date: datetime.date = TEMPLATE_DATE) -> str:
        """The chat template's text of the messages, up to where the response starts; `date` is what templates that
        write today's date are given. Raises TokenizerError, also where a thinking switch changes nothing."""
        raise TokenizerError(f"{self.path} has no chat template; set data.template: none")

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes, and of the special ids."""
        special = [self.bos_id, sorted(self.eos_ids), self.pad_id, self.chat_template]
        whole = json.dumps([self.pieces(), special, self._encoding_rules()])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def _set_eos(self, folder: Path, own: int | None) -> None:
        name, ids = _model_eos(folder)
        ends = set(ids) | ({own} if own is not None else set())
        wrong = sorted(i for i in ends if not 0 <= i < self.vocab_size)
        if wrong:
            raise TokenizerError(f"{folder / name}: eos_token_id {wrong[0]} is beyond the {self.vocab_size} known ids")
        if not ends:
            raise TokenizerError(
                f"{self.path} names no end-of-response id; set eos_token_id in {folder / 'generation_config.json'}"
            )
        self.eos_ids = frozenset(ends)
        origins = [f"{name} {sorted(ids)}"] if ids else []
        origins += [f"tokenizer [{own}]"] if own is not None else []
        self.eos_source = " and ".join(origins)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer directory as transformers reads it: local files only, no code from the directory is run."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen types for a damaged or foreign directory
            raise TokenizerError(f"cannot load the tokenizer in {folder}: {type(error).__name__}: {error}") from error
        self.path = str(folder)
        self.vocab_size = max(self.hf.get_vocab().values(), default=-1) + 1
        if self.vocab_size == 0:
            raise TokenizerError(f"the tokenizer in {folder} has no pieces; are its vocabulary files there?")
        self.bos_id = self.hf.bos_token_id
        self._set_eos(folder, self.hf.eos_token_id)
        self.pad_id = self.hf.pad_token_id if self.hf.pad_token_id is not None else min(self.eos_ids)
        template = self.hf.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.chat_template = template
        self._special = {i: t.content for i, t in self.hf.added_tokens_decoder.items() if t.special}
        self._starts = self.bos_id is not None and self.hf("a").input_ids[:1] == [self.bos_id]

    def encode(self, text: str, start: bool = False) -> list[int]:
        ids = list(self.hf(text, add_special_tokens=False).input_ids)
        return [self.bos_id, *ids] if start and self._starts and self.bos_id is not None else ids

    def decode(self, ids: list[int], keep: str = "") -> str:
        if keep:
            ids = [i for i in ids if i not in self._special or self._special[i] in keep]
        return self.hf.decode(ids, skip_special_tokens=not keep, clean_up_tokenization_spaces=False)

    def pieces(self) -> list[str]:
        pieces = [""] * self.vocab_size
        for piece, i in self.hf.get_vocab().items():
            pieces[i] = piece
        return pieces

    @property
    def terminators(self) -> frozenset[int]:
        said = "Yes."
        try:
            text = self.hf.apply_chat_template(
                [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": said}], tokenize=False
            )
        except Exception:  # no template, or one for other messages
            return self.eos_ids
        end = self.encode(text.rpartition(said)[2].lstrip()) if said in text else []
        return self.eos_ids | {i for i in end[:1] if i in self._special}

    def _encoding_rules(self) -> str:
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            return type(self.hf).__name__
        rules = json.loads(backend.to_str())
        return json.dumps([rules.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")])

    def chat(self, messages: list[Message], thinking: bool | None = None, date: datetime.date = TEMPLATE_DATE) -> str:
        if self.chat_template is None:
            return super().chat(messages)
        switches = [name for name in ("enable_thinking", "thinking") if _mentions(self.chat_template, name)]
        if thinking is not None and not switches:
            raise TokenizerError(
                f"thinking: {str(thinking).lower()}, but the chat template of {self.path} has no thinking switch; "
                "set data.thinking: null"
            )
        if thinking is None:
            return self._rendered(messages, date)
        text = self._rendered(messages, date, **dict.fromkeys(switches, thinking))
        try:
            other = self._rendered(messages, date, **dict.fromkeys(switches, not thinking))
        except TokenizerError:  # who refuses the other way of thinking has a switch
            return text
        if text == other:
            raise TokenizerError(
                f"thinking: {str(thinking).lower()} changes nothing: the chat template of {self.path} sets "
                f"{' and '.join(switches)} itself; set data.thinking: null, and what the template reads instead"
            )
        return text

    def _rendered(self, messages: list[Message], date: datetime.date, **switches: bool) -> str:
        def strftime_now(form: str) -> str:
            self.writes_date = True
            return datetime.datetime.combine(date, datetime.time()).strftime(form)

        try:
            return self.hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=strftime_now, **switches
            )
        except Exception as error:  # a template may refuse messages with whatever jinja raises
            raise TokenizerError(f"the chat template of {self.path} refuses {messages!r}: {error}") from error


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file. BOS is put in front of a prompt where the file defines one, unless the
    config.json beside it says `bos_token_id: null`."""

    def __init__(self, file: Path):
        import sentencepiece

        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except Exception as error:
            raise TokenizerError(f"{file} is not a sentencepiece model: {error}") from error
        self.path = str(file)
        self.vocab_size = self.sp.vocab_size()
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        if _read_json(file.parent / "config.json").get("bos_token_id", self.bos_id) is None:
            self.bos_id = None
        self._set_eos(file.parent, self.sp.eos_id() if self.sp.eos_id() >= 0 else None)
        self.pad_id = self.sp.pad_id() if self.sp.pad_id() >= 0 else min(self.eos_ids)
        self.chat_template = None

    def encode(self, text: str, start: bool = False) -> list[int]:
        ids = self.sp.encode(text)
        return [self.bos_id, *ids] if start and self.bos_id is not None else ids

    def decode(self, ids: list[int], keep: str = "") -> str:
        # a model may embed, and so sample, more ids than the tokenizer has
        unknown = self.sp.unk_id()
        return self.sp.decode([i if i < self.vocab_size else unknown for i in ids])

    def pieces(self) -> list[str]:
        return [self.sp.id_to_piece(i) for i in range(self.vocab_size)]

    def _encoding_rules(self) -> str:
        return hashlib.sha256(self.sp.serialized_model_proto()).hexdigest()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a directory (Hugging Face files, else `tokenizer.model`) or from a sentencepiece `.model` file.

    Raises:
        TokenizerError: nothing usable is there; names the path and what was looked for.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".model":
            raise TokenizerError(f"{path} is no sentencepiece .model file; for Hugging Face files give the directory")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise TokenizerError(f"no tokenizer at {path}: no such file or directory")
    if any((path / name).is_file() for name in HF_FILES):
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise TokenizerError(f"no tokenizer in {path}: found none of {', '.join(HF_FILES)}, tokenizer.model")


def compare_tokenizers(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """Checks that an id means the same to both models.

    Base and instruct models of a family share all pieces but not always the EOS ids or the chat template. Those may
    differ: prompts and the end of responses follow the student alone. Returns such differences as sentences.

    Raises:
        TokenizerError: names the first difference that matters: size, then a piece, then the BOS id.
    """
    ours, theirs = student.pieces(), teacher.pieces()
    names = f"student ({student.path}) and teacher ({teacher.path})"
    if len(ours) != len(theirs):
        owner, longer = ("student", ours) if len(ours) > len(theirs) else ("teacher", theirs)
        first = min(len(ours), len(theirs))
        raise TokenizerError(
            f"the tokenizers of {names} differ in size: {len(ours)} and {len(theirs)}; "
            f"the first id that only the {owner} has is {first}, {longer[first]!r}"
        )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            raise TokenizerError(f"the tokenizers of {names} differ first at id {i}: {a!r} and {b!r}")
    if student.bos_id is not None and teacher.bos_id is not None and student.bos_id != teacher.bos_id:
        raise TokenizerError(
            f"the tokenizers of {names} agree on every piece but differ in the BOS id: {student.bos_id} "
            f"({ours[student.bos_id]!r}) and {teacher.bos_id} ({ours[teacher.bos_id]!r})"
        )
    notes = []
    if student.eos_ids != teacher.eos_ids:
        notes.append(
            f"EOS ids differ, student {sorted(student.eos_ids)}, teacher {sorted(teacher.eos_ids)}; responses end "
            f"at the student's, from {student.eos_source}"
        )
    if student.chat_template != teacher.chat_template:
        notes.append("chat templates differ; prompts use the student's")
    return notes


def check_model_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, model: str) -> None:
    """Raises TokenizerError where the tokenizer has ids that the model's embedding [model_vocab_size, H] lacks."""
    if tokenizer.vocab_size > model_vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, but {model} embeds only {model_vocab_size}; "
            "they do not belong together"
        )


def _model_eos(folder: Path) -> tuple[str, list[int]]:
    """The file that names the model's EOS ids, and the ids; generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) for i in ids):
                raise TokenizerError(f"{folder / name}: eos_token_id must be an id or a list of ids, not {value!r}")
            return name, ids
    return "tokenizer", []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _mentions(template: str, name: str) -> bool:
    """Whether the template's code, not its prose, has the variable."""
    code = "".join(re.findall(r"{[{%].*?[}%]}", template, re.DOTALL))
    return re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", code) is not None
