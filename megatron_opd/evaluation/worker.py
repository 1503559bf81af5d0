"""The process that scores answers. It is run as a script and imports nothing of this package, so it starts quickly and
what a verifier does to its process (hanging, running out of memory, crashing) stays here.

Messages over the connection whose file descriptor is the only argument:
    ("load", verifier, module search path)                      -> ("ready", None) or ("failed", text)
    ("score", seconds, response, answer, metadata, source)      -> ("scored", (score, extracted)) or ("failed", text)
"""

from __future__ import annotations

import functools
import importlib
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

# (response, answer, metadata, source) -> score from 0 to 1, and the answer found in the response
Verifier = Callable[[str, str, dict[str, Any], str], tuple[float, "str | None"]]


def boxed(response: str) -> str | None:
    """What the response's last complete \\boxed{...} (or \\fbox{...}) holds, None where there is none."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", response)]):
        depth = 1
        for end in range(start, len(response)):
            escaped = response[end - 1] == "\\" and response[end - 2] != "\\"
            if not escaped and response[end] in "{}":
                depth += 1 if response[end] == "{" else -1
            if depth == 0:
                return response[start:end].strip()
    return None


def final_answer(response: str) -> str:
    """The marked answer (<answer>...</answer> or boxed), else the text behind the thinking, else the whole text."""
    response = response.rpartition("</think>")[2]
    tagged = ANSWER_TAG.findall(response)
    if tagged:
        return tagged[-1].strip()
    in_box = boxed(response)
    return response.strip() if in_box is None else in_box


def load_math() -> Verifier:
    """math-verify on the boxed answer; equal text needs no computer algebra."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time-outs switched off below
    no_limit: Any = None  # ours works on any thread and kills what does not listen

    def parsed(text: str) -> list[Any]:
        return parse(f"\\boxed{{{text.strip('$')}}}", parsing_timeout=no_limit, fallback_mode="no_fallback")

    def score(response: str, answer: str, metadata: dict[str, Any], source: str) -> tuple[float, str | None]:
        found = boxed(response)
        if found is None:
            return 0.0, None
        reference = (boxed(answer) or answer).strip()
        if found == reference:
            return 1.0, found
        expected = parsed(reference)
        if not expected:
            raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
        return float(verify(expected, parsed(found), timeout_seconds=no_limit, raise_on_error=True)), found

    score("\\boxed{\\frac{1}{2}}", "0.5", {}, "")  # compiles its patterns, outside anyone's time limit
    return score


def load_reasoning_gym() -> Verifier:
    """The scorer of the data set that made the prompt; it is named in the metadata or in the source. The metadata is
    that of reasoning-gym's entry, or the whole entry."""
    from reasoning_gym import get_score_answer_fn

    scorer = functools.cache(get_score_answer_fn)  # building one can take longer than scoring

    def score(response: str, answer: str, metadata: dict[str, Any], source: str) -> tuple[float, str | None]:
        if isinstance(metadata.get("metadata"), dict):
            entry = metadata
        else:
            entry = {"question": metadata.get("question"), "answer": answer, "metadata": metadata}
        name = entry["metadata"].get("source_dataset") or source.removeprefix("reasoning_gym:")
        found = final_answer(response)
        return float(scorer(name)(found, entry)), found

    return score


def load_exact() -> Verifier:
    """Equal text, blanks at the ends aside."""

    def score(response: str, answer: str, metadata: dict[str, Any], source: str) -> tuple[float, str | None]:
        found = final_answer(response)
        return float(found == answer.strip()), found

    return score


def load_custom(name: str) -> Verifier:
    """A user's own MODULE:FUNCTION, called with (response, answer, metadata)."""
    module, _, function = name.partition(":")
    own = getattr(importlib.import_module(module), function)

    def score(response: str, answer: str, metadata: dict[str, Any], source: str) -> tuple[float, str | None]:
        return float(own(response, answer, metadata)), final_answer(response)

    return score


LOADERS = {"math": load_math, "reasoning_gym": load_reasoning_gym, "exact": load_exact}


def serve(connection: Connection) -> None:
    """Answers messages until the other end closes."""
    verifier: Verifier | None = None
    while True:
        try:
            kind, *content = connection.recv()
            if kind == "load":
                name, sys.path[:] = content
                verifier = LOADERS[name]() if name in LOADERS else load_custom(name)
                connection.send(("ready", None))
            else:
                seconds, *arguments = content
                assert verifier is not None, "load goes before score"
                # The parent kills a late worker. Where the parent is gone, this does, even from within C code.
                signal.setitimer(signal.ITIMER_REAL, seconds + 5)
                score, found = verifier(*arguments)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if not 0.0 <= score <= 1.0:
                    raise ValueError(f"the verifier returned {score}, not a score from 0 to 1")
                connection.send(("scored", (score, found)))
        except EOFError:
            return
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(("failed", f"{type(error).__name__}: {error}"[:500]))


def main() -> None:
    """Sets the process up and serves."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and closes us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
