"""Precision and recall of the math verifier over tests/data/math_pairs.jsonl, whose verdicts were decided by hand.

python tests/evaluation/verifier_table.py [CHECKOUT]    prints the table, of this checkout unless another one is named
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

PAIRS = Path(__file__).parents[1] / "data" / "math_pairs.jsonl"


def pairs() -> list[dict]:
    """Convention, response, reference answer, and whether the response is right."""
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def judge() -> list[bool]:
    """The verifier's verdict on each pair."""
    from megatron_opd.evaluation.verifiers import Case, VerifierPool

    with VerifierPool("math", timeout_s=20, workers=2) as pool:
        return [v.correct for v in pool.score([Case(p["response"], p["answer"]) for p in pairs()])]


def rates(verdicts: list[bool], table: list[dict]) -> tuple[float, float]:
    """Precision (share of accepted that are right) and recall (share of right that are accepted)."""
    kinds = Counter((said, p["right"]) for said, p in zip(verdicts, table, strict=True))
    accepted, right = kinds[True, True] + kinds[True, False], kinds[True, True] + kinds[False, True]
    return kinds[True, True] / max(accepted, 1), kinds[True, True] / max(right, 1)


def main() -> None:
    sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[2]))
    table, verdicts = pairs(), judge()
    for name in [*dict.fromkeys(p["convention"] for p in table), "all"]:
        chosen = [(v, p) for v, p in zip(verdicts, table, strict=True) if name in (p["convention"], "all")]
        precision, recall = rates([v for v, _ in chosen], [p for _, p in chosen])
        print(f"{name:10} {len(chosen):4} pairs  precision {precision:6.1%}  recall {recall:6.1%}")
    for said, p in zip(verdicts, table, strict=True):
        if said != p["right"]:
            print("accepted, wrong:" if said else "refused, right: ", repr(p["response"]), "for", repr(p["answer"]))


if __name__ == "__main__":
    main()
