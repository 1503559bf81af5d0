"""Made-up runs for tests of what shows runs: their files as a run writes them, without models."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

ENDS = ("eos", "length", "drift")


def make_run(
    folder: Path, steps: int = 20, wanted: int | None = None, responses: int = 4, length: int = 60, **more: Any
) -> Path:
    """A run of so many steps; `more`: `texts` of tokens by id, `config`, `prompt`, `starts`."""
    folder.mkdir(parents=True)
    source = random.Random(folder.name)
    config = {
        "run_dir": str(folder),
        "student": {"model": "/secret/place/student-1b"},
        "prune": {"preset": "paper", "budget": {"maximum": 512}},
        "train": {"steps": wanted or steps, "lr": 1e-6},
        "data": {"verifier": "exact", "prompts": "/secret/place/prompts.jsonl"},
        **more.get("config", {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines, profiles = [], []
    for step in range(1, steps + 1):
        value = math.exp(-step / steps) + 0.05 * source.random()
        line: dict[str, Any] = {
            "step": step,
            "loss": value,
            "reverse_kl": value,
            "overlap_mean": 1 - value / 2,
            "budget": 128 + step,
            "effective_length_mean": 90 + step,
            "response_length_mean": 110.0 + step,
            "hit_ratio": 0.4,
            "entropy": value / 2,
            "events_mean": 3 * value,
            "tokens_generated": 4000,
            "tokens_kept": 3900,
            "tokens_trained": 3500,
            "tokens_scored": 3600,
            "ended": {"eos": 20, "length": 8, "drift": 4},
            "rollout_s": 6.0,
            "score_s": 1.0,
            "cut_s": 0.1,
            "train_s": 2.5,
            "sync_s": 0.2,
            "checkpoint_s": 0.1,
            "step_s": 9.9,
            "grad_norm": 1.5,
            "lr": 1e-6,
            "memory_gib": 11.5,
        }
        if step % 5 == 0:
            line["accuracy"] = {"sums": 0.3 + 0.5 * step / steps}
        if step == steps // 2:
            line["alarms"] = ["lengths"]
            line["warning"] = "SAVING FAILS: No space left on device"
        lines.append(line)
        bins = 12
        profiles.append(
            {
                "step": step,
                "width": 11,
                "tokens": [300 - 20 * b for b in range(bins)],
                "events": [b * (steps - step) // 4 for b in range(bins)],
                "spent": [b % 3 for b in range(bins)],
                "overlap": [round(1 - b * value / 20, 3) for b in range(bins)],
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "positions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in profiles))
    start = {
        "time": "2026-11-28T06:00:00+0000",
        "processes": 8,
        "job": "17",
        "device": "NVIDIA H100",
        "version": "0.1.0",
        "revision": "abc",
    }
    starts = [{**start, "step": step} for step in more.get("starts", (1, steps // 3))]
    (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    texts = more.get("texts", {"5": "one", "6": " two", "7": " three", "8": "\n", "3": "</s>"})
    (folder / "responses").mkdir()
    ids = [int(i) for i in texts]
    for step in range(1, steps + 1):
        made = [
            _response(source, i, ids, length, more.get("prompt", f"What is {step} + {i}?")) for i in range(responses)
        ]
        data = json.dumps({"step": step, "tokens": texts, "responses": made}).encode()
        (folder / "responses" / f"step_{step:06d}.json.gz").write_bytes(gzip.compress(data))
    return folder


def _response(source: random.Random, i: int, ids: list[int], length: int, prompt: str) -> dict[str, Any]:
    tokens = [ids[j % len(ids)] for j in range(length)]
    overlap = [round(max(0.0, 1 - j / length - 0.2 * source.random()), 3) for j in range(length)]
    events = [j for j, value in enumerate(overlap) if value < 0.3]
    return {
        "prompt": prompt,
        "answer": "one two three",
        "source": ("sums", "words")[i % 2],
        "metadata": {},
        "teacher": "teacher",
        "uid": i,
        "index": i,
        "end_reason": ENDS[i % 3],
        "policy_version": 3,
        "reward": (None, 1.0, 0.0)[i % 3],
        "length": length,
        "effective_length": length // 2,
        "kept_length": length,
        "events": len(events),
        "ids": tokens,
        "logprobs": [-0.1] * length,
        "teacher_logprobs": [-0.7] * (length - 1),
        "overlap": overlap[: length - 1],
        "weight": [round(max(0.0, 1 - j / length), 3) for j in range(length)],
        "drift": events[:-1],
        "candidates": [[t, ids[0]] for t in tokens],
        "candidate_logprobs": [[-0.1, -2.4]] * length,
        "candidate_teacher": [[-0.7, -1.1]] * (length - 1),
    }
