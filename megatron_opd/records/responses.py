"""Some of each step's responses with the drift of every token: RUN/responses/step_N.json.gz.

A file is one JSON object: `step`, `tokens` (texts by id), and `responses`, each with

    prompt, answer, source, metadata, teacher, uid, index, end_reason, policy_version
    reward: the verifier's, where it has looked
    length, effective_length, kept_length, events: in tokens
    ids, logprobs, teacher_logprobs, overlap, weight: of each token; overlap null where the teacher has not read
    drift: positions of drift events
    candidates, candidate_logprobs, candidate_teacher: of each token, the student's CANDIDATES most likely
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import TrainConfig
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.files import new_file
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.records.lines import strict
from megatron_opd.records.reading import RESPONSES, recorded
from megatron_opd.scoring.prune_weights import drift_events_of
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import ScoredBatch

CANDIDATES = 5


class TokenTexts:
    """What single ids stand for in a text, spaces included. An id that is no whole character has its piece's name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._pieces: list[str] = []
        before = tokenizer.encode("a")[-1:]
        self._before, self._prefix = before, tokenizer.decode(before)

    def __getitem__(self, token: int) -> str:
        if token >= self.tokenizer.vocab_size:  # a model's padding
            return f"<{token}>"
        if token not in self._known:
            text = self.tokenizer.decode([*self._before, token]).removeprefix(self._prefix)
            self._known[token] = text if text and "\ufffd" not in text else self._name(token)
        return self._known[token]

    def _name(self, token: int) -> str:
        self._pieces = self._pieces or self.tokenizer.pieces()
        return self._pieces[token] or f"<{token}>"


class ResponseRecorder:
    """Writes the files. Only the writing rank has one.

    Where the folder outgrows `train.record_mb`, every second step's file goes, so that what stays is spread over the
    whole run.
    """

    def __init__(self, run_dir: str, train: TrainConfig, tokenizer: Tokenizer, teachers: Teachers) -> None:
        self.folder = Path(run_dir, RESPONSES)
        self.count, self.bytes = train.record_responses, int(train.record_mb * 2**20)
        self.texts, self.teachers = TokenTexts(tokenizer), teachers

    def drop_from(self, step: int) -> None:
        """Steps that are run again after a resume. Raises OSError."""
        for number, path in recorded(self.folder).items():
            if number >= step:
                path.unlink()

    def record(self, step: int, batch: ScoredBatch, signal: DriftSignal) -> None:
        """Raises OSError."""
        stride = self._stride()
        if not self.count or (step - 1) % stride:
            return
        count = min(self.count, len(batch.rollouts))
        chosen = [i * len(batch.rollouts) // count for i in range(count)]
        responses = [self._described(batch, i, signal) for i in chosen]
        ids = {t for r in responses for t in (*r["ids"], *(c for ids in r["candidates"] for c in ids))}
        whole = {"step": step, "tokens": {i: self.texts[i] for i in sorted(ids)}, "responses": responses}
        self.folder.mkdir(exist_ok=True)
        path, scratch = self.folder / f"step_{step:06d}.json.gz", self.folder / ".partial"
        data = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()
        new_file(scratch).write_bytes(gzip.compress(data, 1, mtime=0))
        os.replace(scratch, path)
        self._thin()

    def _described(self, batch: ScoredBatch, i: int, signal: DriftSignal) -> dict[str, Any]:
        r, s = batch.rollouts[i], batch.scores[i]
        n = s.measured
        overlap = s.columns.get("overlap")
        read = slice(0, n)
        k = min(CANDIDATES, r.topk_ids.shape[1], s.logprobs.shape[1])
        return {
            "prompt": r.prompt.text,
            "answer": r.prompt.answer,
            "source": r.prompt.source,
            "metadata": strict(r.prompt.metadata),
            "teacher": self.teachers.name_of(r.prompt),
            "uid": r.prompt.uid,
            "index": r.index,
            "end_reason": r.end_reason,
            "reward": None if batch.rewards is None else batch.rewards[i],
            "policy_version": r.policy_version,
            "length": len(r),
            "effective_length": batch.effective_length[i],
            "kept_length": batch.kept_length[i],
            "events": batch.events[i],
            "ids": r.tokens.tolist(),
            "logprobs": rounded(r.logprobs),
            "teacher_logprobs": rounded(s.sampled_logprobs[read]),
            "overlap": None if overlap is None else rounded(overlap[read]),
            "weight": rounded(batch.prune_weight[i]),
            "drift": drift_events_of(s, signal).nonzero().flatten().tolist(),
            "candidates": r.topk_ids[:, :k].tolist(),
            "candidate_logprobs": rounded(r.topk_logprobs[:, :k]),
            "candidate_teacher": rounded(s.logprobs[read, :k]),
        }

    def _stride(self) -> int:
        """1, 2, 4, ...: which steps are kept, read off the files, so that a resumed run goes on alike."""
        steps = sorted(recorded(self.folder))
        gaps = [b - a for a, b in zip(steps, steps[1:])]
        stride = 1
        while gaps and stride * 2 <= min(gaps):
            stride *= 2
        return stride

    def _thin(self) -> None:
        files = recorded(self.folder)
        while len(files) > 2 and sum(path.stat().st_size for path in files.values()) > self.bytes:
            stride = self._stride() * 2
            going = [step for step in files if (step - 1) % stride] or list(files)[1::2]
            for step in going:
                files.pop(step).unlink()


def rounded(values: torch.Tensor) -> list[Any]:
    """As a list of three decimals, which is what a person reads; None for what is not finite."""
    numbers = (values.double() * 1000).round().div(1000)
    return numbers.tolist() if bool(numbers.isfinite().all()) else strict(numbers.tolist())
