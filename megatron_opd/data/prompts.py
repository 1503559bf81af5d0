"""Prompt sets: what the models see, with the answers that verifiers need."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property

from megatron_opd.config import DataConfig, EvalSetConfig, TeacherConfig
from megatron_opd.data.sources import (
    DataError,
    Row,
    RowReader,
    broken_character,
    is_missing,
    lookup,
    metadata_of,
    read_rows,
    rows_of_function,
)
from megatron_opd.data.tokenizer import Tokenizer, TokenizerError
from megatron_opd.plugins import is_own
from megatron_opd.types import Prompt

GYM = "reasoning_gym:"
GYM_COLUMNS = ("question", "answer", "source")
GYM_EVAL_SIZE = 500
GYM_STRIDE = 10_000_000  # item i of a stream is seeded with seed + i: seeds this far apart share no item


@dataclass
class PromptSet:
    """The usable prompts of one file in file order, and what was left out."""

    path: str
    prompts: list[Prompt]
    total: int  # rows read
    too_long: int  # left out: longer than max_prompt_tokens
    duplicates: int  # rows whose text repeats an earlier row's
    duplicates_dropped: bool = False
    beyond_limit: int = 0  # left out: an evaluation set's limit was reached before
    notes: list[str] = field(default_factory=list)  # choices made for the user, in words

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(p.tokens) for p in self.prompts), default=0)

    @cached_property
    def longest_of_teacher(self) -> int:
        """Tokens of the longest prompt as the teacher reads it."""
        return max((len(p.teacher_tokens) for p in self.prompts), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the prompts as the models see them and of their answers, in order."""
        digest = hashlib.sha256()
        for p in self.prompts:
            digest.update(json.dumps([p.uid, p.tokens, p.answer]).encode())
            if p.own_teacher_tokens is not None:
                digest.update(json.dumps(p.own_teacher_tokens).encode())
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for the log."""
        dropped = "dropped" if self.duplicates_dropped else "kept"
        left_out = f"{self.too_long} too long, {self.duplicates} duplicates ({dropped})"
        return "; ".join([f"{self.path}: {len(self)} of {self.total} prompts, {left_out}", *self.notes])


def load_prompts(
    data: DataConfig,
    tokenizer: Tokenizer,
    need_answers: bool | None = False,
    verifier: str = "",
    teachers: Mapping[str, TeacherConfig] | None = None,
) -> PromptSet:
    """Reads, templates and tokenizes the prompts that `data.prompts` names.

    Args:
        teachers: by the prompts' sources, "" for all others: they have prompts of their own where their `system` or
            `context_key` says so.
        need_answers: refuse prompts without a reference answer, which `verifier` needs; False: only where others have
            one; None: never, nothing looks at them.

    Raises:
        DataError: names the file, the line, the key and the problem; also where no prompt is left.
        TokenizerError: `data.template` does not fit the tokenizer.
    """
    is_gym = data.prompts.startswith(GYM)
    if is_gym:
        rows = _gym_rows(data)
    elif is_own(data.prompts):
        rows = rows_of_function(data.prompts, data.size, data.seed)
    else:
        rows = read_rows(data.prompts)
    columns = GYM_COLUMNS if is_gym else (data.prompt_key, data.answer_key, data.source_key)
    reader = RowReader(*columns, need_answers, verifier)
    given = {"data.suffix": data.suffix, "data.system": data.system or ""}
    for source, teacher in (teachers or {}).items():
        of = f" of the teacher of {source}" if source else ""
        given |= {f"teacher.system{of}": teacher.system or "", f"teacher.context{of}": teacher.context}
    for key, text in given.items():
        if half := broken_character(text):
            raise DataError(f"{key}: holds {half}, half a character")
    result = PromptSet(data.prompts, [], 0, 0, 0, data.duplicates == "drop")
    seen: dict[str, tuple[str, list[int]]] = {}  # prompt as in the file -> text, tokens
    for row in rows:
        result.total += 1
        prompt = reader.prompt(row)
        source, own = reader.source(row), None
        if teachers is not None:
            teacher = teachers.get(source, teachers[""])
            own = _teacher_tokens(row, deepcopy(prompt), data, teacher, tokenizer)
        key = prompt if isinstance(prompt, str) else json.dumps(prompt)
        repeated = key in seen
        result.duplicates += repeated
        if not repeated:
            text = _text(row, prompt, data, tokenizer)
            seen[key] = text, tokenizer.encode(text, start=data.template == "none")
        text, tokens = seen[key]
        answer = reader.answer(row)
        if repeated and data.duplicates == "drop":
            continue
        if len(tokens) > data.max_prompt_tokens:
            result.too_long += 1
            continue
        result.prompts.append(Prompt(row.uid, text, tokens, answer, source, metadata_of(row), own))
    if result.total == 0:
        raise DataError(f"{data.prompts}: the file is empty")
    if not result.prompts:
        raise DataError(
            f"{data.prompts}: all {result.total} prompts are longer than max_prompt_tokens: {data.max_prompt_tokens}; "
            f"the shortest has {min(len(tokens) for _, tokens in seen.values())} tokens"
        )
    result.notes += reader.notes
    if data.template == "chat" and tokenizer.writes_date:
        result.notes.append(f"the chat template writes the date: always {data.date}, from data.date")
    return result


def load_eval_prompts(eval_set: EvalSetConfig, data: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """An evaluation set's prompts; what the set leaves open is taken from `data`. Raises as `load_prompts`."""
    own = {k: getattr(eval_set, k) for k in ("prompt_key", "answer_key", "suffix", "thinking")}
    changes = {k: v for k, v in own.items() if v is not None}
    changes |= {"prompts": eval_set.prompts, "seed": eval_set.seed, "duplicates": "keep"}
    changes |= {"size": eval_set.limit or GYM_EVAL_SIZE}
    try:
        result = load_prompts(data.model_copy(update=changes), tokenizer, need_answers=True, verifier=eval_set.verifier)
    except DataError as error:
        raise DataError(f"eval set {eval_set.name}: {error}") from error
    kept = result.prompts[: eval_set.limit]
    result.beyond_limit = len(result.prompts) - len(kept)
    result.prompts = kept
    return result


def _teacher_tokens(
    row: Row, prompt: str | list[dict[str, str]], data: DataConfig, teacher: TeacherConfig, tokenizer: Tokenizer
) -> list[int] | None:
    """What the teacher reads in place of the student's prompt; None where it reads the same. Changes `prompt`."""
    if not teacher.reads_another_prompt:
        return None
    if teacher.context_key is not None:
        context = lookup(row.values, teacher.context_key)
        if is_missing(context) or not isinstance(context, str | int | float):
            raise DataError(
                f"{row.where}: {teacher.context_key} (teacher.context_key) is missing, empty or no text; every prompt "
                "needs what the teacher is to read"
            )
        if half := broken_character(str(context)):
            raise DataError(f"{row.where}: {teacher.context_key} (teacher.context_key) holds {half}, half a character")
        own = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        texts = {"{context}": str(context), "{prompt}": own}
        joined = re.sub(r"\{context\}|\{prompt\}", lambda match: texts[match.group()], teacher.context)
        if isinstance(prompt, str):
            prompt = joined
        else:
            prompt[-1]["content"] = joined
    if teacher.system is not None:
        data = data.model_copy(update={"system": teacher.system})
        if isinstance(prompt, list) and prompt[0]["role"] == "system":
            del prompt[0]
    return tokenizer.encode(_text(row, prompt, data, tokenizer), start=data.template == "none")


def _text(row: Row, prompt: str | list[dict[str, str]], data: DataConfig, tokenizer: Tokenizer) -> str:
    if data.template == "none":
        if isinstance(prompt, list):
            if len(prompt) > 1:
                raise DataError(
                    f"{row.where}: {len(prompt)} chat messages cannot become plain text; set data.template: chat"
                )
            prompt = prompt[0]["content"]
        return prompt + data.suffix
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages[-1]["content"] += data.suffix
    if data.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system})
    try:
        return tokenizer.chat(messages, data.thinking, data.date)
    except TokenizerError as error:
        raise TokenizerError(f"{row.where}: {error}") from error


def _gym_rows(data: DataConfig) -> Iterator[Row]:
    """Items of a reasoning-gym data set as rows; the metadata holds the whole entry, for its scorer."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"{data.prompts} needs the package reasoning-gym: {error}") from error
    name = data.prompts.removeprefix(GYM)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {GYM}{near[0]}?" if near else f"; known are {', '.join(sorted(DATASETS))}"
        raise DataError(f"{data.prompts}: reasoning-gym has no data set {name!r}{hint}")
    try:
        items = reasoning_gym.create_dataset(name, seed=data.seed * GYM_STRIDE, size=data.size)
    except Exception as error:  # one needs a configuration of its own, others files
        raise DataError(f"{data.prompts}: cannot be made: {error}") from error
    for i in range(data.size):
        entry = items[i]
        entry = {**entry, "metadata": {**entry["metadata"], "source_dataset": name}}
        values = {"question": entry["question"], "answer": entry["answer"], "source": GYM + name, "metadata": entry}
        yield Row(i, f"{data.prompts}: item {i + 1}", values)
