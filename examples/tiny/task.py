"""The task of the embedded example: reasoning-gym's chain_sum, a prompt template, and written responses to train on.

A response adds one term a line, digit by digit from the units, with every carry or borrow written down; lines all have
the same length, which is what lets a model of a third of a million parameters learn it in minutes:

    Solve                 the prompt: the terms of the expression, labelled
    A+42
    B+25
    C-18
    Steps
    A+42>042              the response starts here: running sums of three digits
    B+25:2+5=07,4+2+0=06,0+0=0>067
    C-18:7-8=19,6-1-1=04,0-0=0>049
    \\boxed{49}

`X+Y=cd` reads: digit d, and carry (or borrow) c for the next column.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import reasoning_gym

LABELS = "ABCDEFGHIJKL"
MIN_TERMS, MAX_TERMS = 5, 10
TRAIN_SEED, TRAIN_SIZE = 1, 20_000  # of the problems that the models are trained on; the prompts exclude these
FILLER = ("wait", "hmm", "let me see", "maybe not", "is that so", "let me check that again", "no", "wait a moment")


@dataclass(frozen=True)
class Problem:
    """One chain_sum entry: signed terms in order, and the entry that reasoning-gym's verifier needs."""

    terms: tuple[int, ...]
    entry: dict

    @property
    def prompt(self) -> str:
        """The plain text that the model sees; its response follows directly."""
        lines = [f"{LABELS[i]}{signed(t)}" for i, t in enumerate(self.terms)]
        return "\n".join(["Solve", *lines, "Steps"]) + "\n"


def signed(term: int) -> str:
    """A two-digit term with its sign, as the prompt shows it."""
    return f"{'-' if term < 0 else '+'}{abs(term):02d}"


def problems(seed: int, size: int) -> list[Problem]:
    """`size` problems from reasoning-gym, MIN_TERMS to MAX_TERMS terms of two digits in equal shares.

    Only expressions whose running sums stay within 0..999 are kept, so that the responses need no signs.
    """
    shares = range(MIN_TERMS, MAX_TERMS + 1)
    found: list[Problem] = []
    for n in shares:
        wanted = size // len(shares) + (n - MIN_TERMS < size % len(shares))
        # Sources of different lengths and seeds never share a range of reasoning-gym's per-item seeds (seed + index).
        source = reasoning_gym.create_dataset(
            "chain_sum",
            seed=seed * 100_000_000 + n * 5_000_000,
            size=5_000_000,
            min_terms=n,
            max_terms=n,
            min_digits=2,
            max_digits=2,
        )
        index = 0
        while wanted:
            entry = source[index]
            index += 1
            pieces = entry["metadata"]["expression"].replace("+ ", "+").replace("- ", "-").split()
            terms = tuple(int(piece) for piece in pieces)
            sums = [sum(terms[: i + 1]) for i in range(len(terms))]
            if 0 <= min(sums) and max(sums) <= 999:
                found.append(Problem(terms, entry))
                wanted -= 1
    random.Random(seed).shuffle(found)
    return found


def add_line(label: str, total: int, term: int, forget: float, rng: random.Random) -> tuple[str, int]:
    """One line of a response and the sum it ends with; with probability `forget` a carry or borrow is forgotten."""
    sign, op = (-1, "-") if term < 0 else (1, "+")
    hundreds, tens, units = total // 100, total // 10 % 10, total % 10
    term_tens, term_units = abs(term) // 10, abs(term) % 10
    value = units + sign * term_units
    carry, digit_units = int(not 0 <= value <= 9), value % 10
    used = 0 if carry and rng.random() < forget else carry
    value = tens + sign * (term_tens + used)
    carry_tens, digit_tens = int(not 0 <= value <= 9), value % 10
    digit_hundreds = (hundreds + sign * carry_tens) % 10
    result = 100 * digit_hundreds + 10 * digit_tens + digit_units
    text = (
        f"{label}{signed(term)}:{units}{op}{term_units}={carry}{digit_units},"
        f"{tens}{op}{term_tens}{op}{used}={carry_tens}{digit_tens},{hundreds}{op}{carry_tens}={digit_hundreds}>{result:03d}\n"
    )
    return text, result


def clean_answer(problem: Problem) -> str:
    """The written-out response, without a mistake."""
    return sloppy_answer(problem, random.Random(0), forget_plus=0.0, forget_minus=0.0, ramble=0.0)[0]


def sloppy_answer(
    problem: Problem, rng: random.Random, forget_plus: float, forget_minus: float, ramble: float, filler_words: int = 30
) -> tuple[str, bool]:
    """A response as a careless writer gives it, and whether it comes to an end.

    Carries and borrows are forgotten with the given probabilities. Before each line, with probability `ramble`, the
    writer starts to doubt and goes on doubting: filler, with neither a result nor an end.
    """
    total = problem.terms[0]
    text = f"{LABELS[0]}{signed(total)}>{total:03d}\n"
    for i, term in enumerate(problem.terms[1:], start=1):
        if rng.random() < ramble:
            return text + "".join(rng.choice(FILLER) + ",\n" for _ in range(filler_words)), False
        forget = forget_minus if term < 0 else forget_plus
        line, total = add_line(LABELS[i], total, term, forget, rng)
        text += line
    return text + f"\\boxed{{{total}}}", True
