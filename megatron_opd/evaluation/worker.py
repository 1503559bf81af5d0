"""The process that scores responses. It is run as a script and imports nothing of this package, so it starts quickly
and what a verifier does to its process (hanging, running out of memory, crashing) stays here.

Messages over the connection whose file descriptor is the only argument, replies as JSON:
    ("load", verifier, module search path)                      -> ("ready", None) or ("failed", text)
    ("score", seconds, response, answer, metadata, source, opened)
                                                                -> ("scored", (score, extracted)) or ("failed", text)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# A runaway symbolic expansion must not take the machine's memory with it.
MEMORY_LIMIT = 8 << 30
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # reasoning-gym's convention

# (response, answer, metadata, source, the marker of thinking that the prompt ended with) -> score from 0 to 1, and the
# answer found in the response
Verifier = Callable[[str, str, dict[str, Any], str, str], tuple[float, "str | None"]]

# How models and templates mark their thinking: what lies between is no answer, and neither is what a response that was
# cut in its thinking has said so far.
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
# "Answer: 4" (DAPO-Math-17K, whose prompts ask for it), "**Final answer:** 4", "#### 4" (GSM8K), alone on a line.
ANSWER_LINE = re.compile(
    r"^[\s>*#_-]*(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*)?[*_]*\s*[:：]|####)(.*)$", re.I | re.M
)
# Between two boxes that are one answer: "\\boxed{1} and \\boxed{2}", "$x=\\boxed{1}$ or $x=\\boxed{2}$".
NATURAL_LOGARITHM = re.compile(r"\\log\s*_\s*(?:e(?![A-Za-z])|\{\s*e\s*\})")  # math-verify reads no base e
CONNECTED = re.compile(
    r"(?:[\s$,;&]|and|or|\\(?:text|mbox|mathrm)\{\s*(?:and|or)\s*\}|\\q?quad|\\[,;!()\[\]]|[A-Za-z]\w{0,2}\s*=)*"
)
# The letter of AMC's choices in front of the value: "\\textbf{(C)}\\ 18".
CHOICE = re.compile(r"\A\\(?:text|textbf|mathrm|mathbf)\{\s*\(?[A-E]\)?\s*\}(?:\\[ ,;:]|\\q?quad|[~\s])+(?=\S)")


def opened_thinking(prompt: str) -> str:
    """The marker of thinking that a prompt ends with, as some chat templates leave it: what is generated is thinking
    then, although it has no such marker of its own. "" where there is none."""
    end = prompt.rstrip()
    return next((begin for begin, _ in THINKING if end.endswith(begin)), "")


def final_part(response: str) -> str:
    """The response behind its thinking; empty where the thinking was never finished."""
    for begin, end in THINKING:
        if end in response:
            response = response.rpartition(end)[2]
        response = response.partition(begin)[0]
    return response


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each complete \\boxed{...} or \\fbox{...}, or \\boxed 5 without braces, in order."""
    spans = []
    for match in BOX.finditer(text):
        start = match.end()
        if start == len(text):
            continue
        if text[start] != "{":  # TeX takes the next token
            token = re.match(r"\\[A-Za-z]+|[^\s\\{}$]", text[start:])
            if token and match.group().rstrip() != match.group():
                spans.append((match.start(), start + token.end(), _unbraced(text[start:])))
            continue
        depth = 0
        for at in range(start, len(text)):
            escaped = text[at - 1] == "\\" and text[at - 2] != "\\"
            if not escaped and text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            if depth == 0:
                content = text[start + 1 : at].strip()
                spans.append((match.start(), at + 1, re.sub(r"(?<!\.)\.$", "", content)))
                break
    return spans


def _unbraced(text: str) -> str:
    """The number or word behind a \\boxed that has no braces; models mean more than TeX's one token."""
    match = re.match(r"-?\d[\d.,]*\d|[^\s$]+?(?=[.,;:!?]?(?:[\s$]|$))", text)
    return match.group() if match else text[:1]


def boxed(text: str) -> str | None:
    """What the last box holds, or the last boxes where only "and", "or" or a comma stand between them; else None."""
    spans = boxes(text)
    if not spans:
        return None
    together = [spans[-1]]
    for earlier in reversed(spans[:-1]):
        if not CONNECTED.fullmatch(text, earlier[1], together[0][0]):
            break
        together.insert(0, earlier)
    return ", ".join(content for _, _, content in together)


def marked_answer(text: str) -> str | None:
    """What a final part marks as its answer: <answer>...</answer>, else the later of its last box and its last line
    that begins with "Answer:"; None where it marks nothing, "" where it was cut inside its last box."""
    tagged = ANSWER_TAG.findall(text)
    if tagged:
        inside = boxed(tagged[-1])
        return tagged[-1].strip() if inside is None else inside
    lines = [m for m in ANSWER_LINE.finditer(text) if m.group(1).strip(" *_$")]
    begun = [m.start() for m in BOX.finditer(text) if text[m.end() : m.end() + 1] == "{"]
    last_box = max((start for start, _, _ in boxes(text)), default=-1)
    if begun and begun[-1] > last_box:
        return ""
    if lines and lines[-1].start() > last_box:
        return _bare(lines[-1].group(1))
    return boxed(text)


def _bare(line: str) -> str:
    """An answer line's content without the emphasis, dollars and full stop around it."""
    line = line.strip().strip("*_").strip()
    line = line[:-1].rstrip() if line.endswith(".") else line
    for begin, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(line) > len(begin + end) and line.startswith(begin) and line.endswith(end):
            inner = line[len(begin) : -len(end)]
            return line if begin in inner else inner.strip()
    return line.removeprefix("$") if line.count("$") == 1 else line


def final_answer(response: str) -> str:
    """The marked answer, else the text behind the thinking."""
    part = final_part(response)
    marked = marked_answer(part)
    return part.strip() if marked is None else marked


def load_math() -> Verifier:
    """math-verify on the marked answer, or, where nothing is marked, on the whole final part."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time-outs switched off below
    no_limit: Any = None  # ours works on any thread and kills what does not listen

    def parsed(text: str) -> list[Any]:
        text = NATURAL_LOGARITHM.sub(r"\\ln", text.strip("$"))
        return parse(f"\\boxed{{{text}}}", parsing_timeout=no_limit, fallback_mode="no_fallback")

    def score(
        response: str, answer: str, metadata: dict[str, Any], source: str, opened: str
    ) -> tuple[float, str | None]:
        part = final_part(opened + response)
        extracted = marked_answer(part)
        if not part.strip() or extracted == "":
            return 0.0, None
        reference = final_answer(answer)
        if extracted == reference:
            return 1.0, extracted
        expected = parsed(reference)
        if not expected:
            raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
        read = (
            parse(part, parsing_timeout=no_limit) if extracted is None else parsed(CHOICE.sub("", extracted, count=1))
        )
        shown = extracted if extracted is not None else str(read[-1]) if read else None
        return float(verify(expected, read, timeout_seconds=no_limit, raise_on_error=True)), shown

    score("\\boxed{\\frac{1}{2}}", "0.5", {}, "", "")  # compiles its patterns, outside anyone's time limit
    return score


def load_reasoning_gym() -> Verifier:
    """The scorer of the data set that made the prompt; it is named in the metadata or in the source. The metadata is
    that of reasoning-gym's entry, or the whole entry, as it was made or as a file of JSON or Parquet gives it back."""
    from reasoning_gym import create_dataset, get_score_answer_fn

    scorer = functools.cache(get_score_answer_fn)  # building one can take longer than scoring

    @functools.cache
    def examples(name: str) -> list[Any]:
        items = create_dataset(name, seed=0, size=5)
        return [items[i]["metadata"] for i in range(5)]

    def score(
        response: str, answer: str, metadata: dict[str, Any], source: str, opened: str
    ) -> tuple[float, str | None]:
        metadata = _object(metadata)
        if len(metadata) == 1 and "metadata" in metadata:  # a column of text
            metadata = _object(metadata["metadata"])
        if "metadata" in metadata:
            entry = {**metadata, "metadata": _object(metadata["metadata"])}
        else:
            entry = {"question": metadata.get("question"), "answer": answer, "metadata": metadata}
        name = entry["metadata"].get("source_dataset") or source.removeprefix("reasoning_gym:")
        extracted = final_answer(opened + response)
        scored = scorer(name)
        entry["metadata"] = types_restored(entry["metadata"], examples(name))
        return max(float(scored(text, entry)) for text in _with_blanks(extracted, entry.get("answer"))), extracted

    return score


def _object(value: Any) -> dict[str, Any]:
    """An object that a file keeps as such or as text of JSON."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError(f"the metadata must be reasoning-gym's entry, not {str(value)[:80]!r}")
    return value


def _with_blanks(text: str, answer: Any) -> set[str]:
    """The answer, and with the blanks around the reference that marking an answer takes away."""
    return {text, answer} if isinstance(answer, str) and answer.strip() == text else {text}


def types_restored(value: Any, examples: list[Any]) -> Any:
    """`value`, which JSON or Parquet may have changed, with the types of the same data set's `examples`: lists that
    were tuples, keys that were numbers."""
    if isinstance(value, (list, tuple)):
        lists = [e for e in examples if isinstance(e, (list, tuple))]
        values = [types_restored(x, [x for e in lists for x in e]) for x in value]
        return tuple(values) if lists and all(isinstance(e, tuple) for e in lists) else values
    if isinstance(value, dict):
        objects = [e for e in examples if isinstance(e, dict)]
        keys = {key for e in objects for key in e}
        numbered = bool(keys) and all(isinstance(key, int) for key in keys)
        restored = {}
        for key, inner in value.items():
            of_key = [e[key] for e in objects if key in e] or [x for e in objects for x in e.values()]
            restored[int(key) if numbered and isinstance(key, str) else key] = types_restored(inner, of_key)
        return restored
    return value


def load_exact() -> Verifier:
    """Equal text, blanks at the ends aside."""

    def score(
        response: str, answer: str, metadata: dict[str, Any], source: str, opened: str
    ) -> tuple[float, str | None]:
        extracted = final_answer(opened + response)
        return float(extracted == answer.strip()), extracted

    return score


def load_custom(name: str) -> Verifier:
    """A user's own MODULE:FUNCTION, called with (response, answer, metadata), the response as it was generated."""
    module, _, function = name.partition(":")
    own = getattr(importlib.import_module(module), function)

    def score(
        response: str, answer: str, metadata: dict[str, Any], source: str, opened: str
    ) -> tuple[float, str | None]:
        return float(own(response, answer, metadata)), final_answer(opened + response)

    return score


LOADERS = {"math": load_math, "reasoning_gym": load_reasoning_gym, "exact": load_exact}


def become_subreaper() -> None:
    """Processes that a verifier's children leave behind become this process's own children, where they can be ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_children() -> None:
    """Kills what the last verdict has left running; returns at once where nothing was."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """Process ids whose parent is this process."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):  # it has ended by now
                continue
            if parent == os.getpid():
                pids.append(int(entry))
    return pids


def reply(connection: Connection, kind: str, content: Any) -> None:
    """As JSON: the trainer must not unpickle what comes from where responses are parsed."""
    connection.send_bytes(json.dumps((kind, content)).encode())


def serve(connection: Connection) -> None:
    """Replies to messages until the other end closes."""
    verifier: Verifier | None = None
    own_pid = os.getpid()
    while True:
        try:
            kind, *content = connection.recv()
            if kind == "load":
                name, sys.path[:] = content
                verifier = LOADERS[name]() if name in LOADERS else load_custom(name)
                reply(connection, "ready", None)
            else:
                seconds, *arguments = content
                assert verifier is not None, "load goes before score"
                # The parent kills a late worker. Where the parent is gone, this does, even from within C code.
                signal.setitimer(signal.ITIMER_REAL, seconds + 5)
                score, extracted = verifier(*arguments)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if os.getpid() != own_pid:  # the verifier forked, and this is the child: one verdict is enough
                    os._exit(0)
                end_children()
                if not 0.0 <= score <= 1.0:
                    raise ValueError(f"the verifier returned {score}, not a score from 0 to 1")
                reply(connection, "scored", (score, extracted))
        except EOFError:
            return
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if os.getpid() != own_pid:
                os._exit(1)
            end_children()
            reply(connection, "failed", f"{type(error).__name__}: {error}"[:500])


def main() -> None:
    """Sets the process up and serves."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and closes us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    become_subreaper()
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
