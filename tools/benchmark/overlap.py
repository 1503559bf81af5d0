"""`overlap`: prune.topk_overlap against gathering candidates, and against gathering the logits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark.common import (
    ProcessGroup,
    alternate,
    clocked,
    counted_bytes,
    peak_memory,
    print_table,
    resolve_device,
    shown,
    summary,
    write_json,
)

NAMES = {
    "ours": "topk_overlap",
    "candidates": "(a) all-gather values and ids, top-k again",
    "logits": "(b) all-gather full logits",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4], help="tensor-parallel sizes")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the logits (default bf16)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--logits-repeats", type=int, default=2, help="rounds that (b) takes part in")
    parser.add_argument(
        "--gather-tokens",
        type=int,
        default=256,
        help="tokens whose logits (b) gathers at once: all at once would not fit",
    )


class Overlap:
    """One tensor rank: its columns of both models' logits, and the three ways."""

    def __init__(self, rank: int, size: int, settings: dict[str, Any], device: str) -> None:
        import torch
        import torch.distributed as dist

        self.settings, self.device, self.group = settings, device, dist.group.WORLD
        dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
        where = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
        tokens, columns = settings["tokens"], settings["vocab"] // size
        source = torch.Generator(where).manual_seed(rank)
        self.student = torch.empty(tokens, columns, dtype=dtype, device=where)
        self.teacher = torch.empty_like(self.student)
        for start in range(0, tokens, 256):
            rows = self.student[start : start + 256]
            base = torch.randn(rows.shape, generator=source, device=where)
            rows.copy_(base)
            noise = torch.randn(rows.shape, generator=source, device=where)
            self.teacher[start : start + 256].copy_(base + 0.5 * noise)

    def run(self, name: str) -> Any:
        from megatron_opd.prune import topk_overlap

        if name == "ours":
            return topk_overlap(self.student, self.teacher, self.settings["k"], self.group)
        return self._candidates() if name == "candidates" else self._logits()

    def timed(self, name: str) -> float:
        return clocked(lambda: self.run(name), self.device)[0]

    def measured(self, name: str) -> tuple[float, int]:
        """Bytes that this rank sends, and its peak memory."""
        totals: dict[str, float] = {}
        with counted_bytes(totals):
            peak = peak_memory(lambda: self.run(name), self.device)
        return totals["bytes"], peak

    def agreement(self) -> float:
        """Largest difference of ours to (a); without ties (fp32) they are equal."""
        return float((self.run("ours") - self.run("candidates")).abs().max())

    def _candidates(self) -> Any:
        import torch
        import torch.distributed as dist

        k, size, tops = self.settings["k"], dist.get_world_size(), []
        for logits in (self.student, self.teacher):
            values, ids = logits.topk(k, dim=1)
            ids = ids + dist.get_rank() * logits.shape[1]
            all_values = [torch.empty_like(values) for _ in range(size)]
            all_ids = [torch.empty_like(ids) for _ in range(size)]
            dist.all_gather(all_values, values)
            dist.all_gather(all_ids, ids)
            best = torch.cat(all_values, 1).topk(k, dim=1).indices
            tops.append(torch.cat(all_ids, 1).gather(1, best))
        return _share(tops[0], tops[1], k)

    def _logits(self) -> Any:
        import torch
        import torch.distributed as dist

        k, step, size, parts = self.settings["k"], self.settings["gather_tokens"], dist.get_world_size(), []
        for start in range(0, self.settings["tokens"], step):
            tops = []
            for logits in (self.student, self.teacher):
                piece = logits[start : start + step].contiguous()
                pieces = [torch.empty_like(piece) for _ in range(size)]
                dist.all_gather(pieces, piece)
                tops.append(torch.cat(pieces, 1).topk(k, dim=1).indices)
            parts.append(_share(tops[0], tops[1], k))
        return torch.cat(parts)


def _share(student_ids: Any, teacher_ids: Any, k: int) -> Any:
    return (student_ids[:, :, None] == teacher_ids[:, None, :]).any(-1).sum(1) / k


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    keys = ("tokens", "vocab", "k", "dtype", "repeats", "logits_repeats", "gather_tokens")
    settings = {key: getattr(options, key) for key in keys}
    results: dict[str, Any] = {}
    rows = []
    for size in options.tp:
        if settings["vocab"] % size:
            raise SystemExit(f"--tp {size} does not divide --vocab {settings['vocab']}")
        with ProcessGroup(size, Overlap, settings, device, device=device, threads=options.threads) as group:
            measures = {name: (lambda name=name: max(group.call("timed", name))) for name in NAMES}
            times = alternate(measures, options.repeats, rare=("logits",), rare_repeats=options.logits_repeats)
            memory = {name: group.call("measured", name) for name in NAMES}
            difference = group.call("agreement")[0]
        entry: dict[str, Any] = {"difference_to_candidates": difference}
        for name in NAMES:
            entry[name] = {
                "seconds": summary(times[name]),
                "bytes_sent": max(sent for sent, _ in memory[name]),
                "peak_bytes": max(peak for _, peak in memory[name]),
            }
        ours = entry["ours"]
        for name in NAMES:
            other = entry[name]
            slower = other["seconds"]["median"] / ours["seconds"]["median"]
            other["times_ours"] = slower
            other["bytes_times_ours"] = other["bytes_sent"] / ours["bytes_sent"]
            rows.append(
                [
                    f"TP{size} {NAMES[name]}",
                    shown(other["seconds"]),
                    f"{slower:.2f}x",
                    f"{other['bytes_sent'] / 2**20:.2f} MiB",
                    f"{other['bytes_times_ours']:.2f}x",
                    f"{other['peak_bytes'] / 2**20:.0f} MiB",
                ]
            )
        results[f"tp{size}"] = entry
    print_table(
        f"overlap of {options.tokens} tokens, vocabulary {options.vocab}, {options.dtype}, K {options.k}; per rank",
        ("way", "time: median, quartiles", "of ours", "bytes sent", "of ours", "peak memory"),
        rows,
    )
    write_json(Path(options.json), "overlap", settings, results, device)
    return 0
