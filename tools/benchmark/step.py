"""`step`: a training step against the share of tokens kept. `scaling`: a step against layers, length, batch, ranks."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.common import (
    ProcessGroup,
    alternate,
    clocked,
    growth_exponent,
    make_model,
    print_table,
    resolve_device,
    shown,
    summary,
    write_json,
)

PROMPT_TOKENS = 48
LAYOUTS = {
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "pp2dp2": (4, {"pipeline": 2}),
}


def _add_common(parser: argparse.ArgumentParser, responses: int, tokens: int, microbatch: int) -> None:
    parser.add_argument("--responses", "--answers", type=int, default=responses, help="of one step")
    parser.add_argument("--tokens", type=int, default=tokens, help="of the longest response")
    parser.add_argument("--microbatch", type=int, default=microbatch, help="tokens of one")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=96)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["pp2", "dp2"])
    parser.add_argument("--shares", type=float, nargs="+", default=[100, 50, 25, 10], help="per cent of tokens kept")
    _add_common(parser, responses=64, tokens=1024, microbatch=2048)


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--doublings", type=int, default=2, help="of each size, from the base on")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="data-parallel ranks")
    _add_common(parser, responses=16, tokens=512, microbatch=4096)


class Steps:
    """One rank with a trainer for each model, and batches of random responses."""

    def __init__(self, rank: int, size: int, models: list[str], parallel: dict, settings: dict, device: str) -> None:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        from megatron_opd.config import parse_config
        from megatron_opd.training.setup import build_trainer, init_distributed
        from megatron_opd.training.step import TrainingStep

        self.settings, self.device, self.idle = settings, device, 0.0
        self.steps = []
        for model in models:
            side = {"model": model, "precision": settings["precision"], "parallel": parallel}
            values = {
                "device": device,
                "student": side,
                "teacher": side,
                "prune": {"k": settings["k"]},
                "train": {"steps": 10**6, "lr": 1e-6, "tokens_per_microbatch": settings["microbatch"]},
                "data": {"prompts": "none.jsonl"},
            }
            config = parse_config(values)
            trainer = build_trainer(config, init_distributed(config))
            self._watch_the_end(trainer)
            self.steps.append(TrainingStep(trainer, config))
        for name in [n for n in dir(P2PCommunicator) if n.startswith(("send_", "recv_"))]:
            setattr(P2PCommunicator, name, self._idling(getattr(P2PCommunicator, name)))

    def _idling(self, function: Any) -> Any:
        """The function, its time booked as idle: waiting for, and talking to, the neighbouring stage."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._synchronize()
            self.idle += time.perf_counter() - started
            return result

        return call

    def _watch_the_end(self, trainer: Any) -> None:
        """Ranks wait for each other before gradients are finalised: this wait is told from the reduction."""
        import torch.distributed as dist

        finalize = trainer.student.config.finalize_model_grads_func
        barrier = self._idling(dist.barrier)

        def call(*args: Any, **kwargs: Any) -> Any:
            barrier()
            return finalize(*args, **kwargs)

        trainer.student.config.finalize_model_grads_func = call

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def step(self, model: int, responses: int, tokens: int, share: float) -> dict[str, float]:
        """One step on `responses` responses of tokens / 2 to `tokens` tokens, of each of which `share` is kept."""
        batch = random_batch(responses, tokens, share, self.settings["vocab"], self.settings["k"])
        self.idle = 0.0
        seconds, result = clocked(lambda: self.steps[model](batch), self.device)
        if not result.applied:
            raise RuntimeError(f"the step was skipped: {result.reason}")
        return {"seconds": seconds, "idle": self.idle, "microbatches": result.microbatches}


def random_batch(responses: int, tokens: int, share: float, vocab: int, k: int) -> Any:
    """A ScoredBatch of random responses, the same for equal arguments."""
    import torch

    from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores

    source = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Any:
        return torch.randint(vocab, shape, generator=source)

    rollouts, scores, kept = [], [], []
    for i in range(responses):
        n = int(torch.randint(tokens // 2, tokens + 1, (1,), generator=source))
        prompt = Prompt(i, "", draw(PROMPT_TOKENS).tolist())
        ids = (draw(n, 1) + torch.arange(k)) % vocab
        logprobs = torch.randn(n, k, generator=source).log_softmax(-1)
        rollouts.append(Rollout(prompt, i, draw(n), logprobs[:, 0], ids, logprobs, "length", 0))
        own = torch.randn(n, k, generator=source).log_softmax(-1)
        scores.append(TeacherScores(own, own[:, 0], torch.ones(n), torch.ones(n, dtype=torch.bool)))
        kept.append(max(1, round(share * n)))
    total = sum(len(r) for r in rollouts)
    weights = [torch.ones(len(r)) for r in rollouts]
    return ScoredBatch(rollouts, scores, weights, kept, kept, [0] * responses, total)


def _settings(options: argparse.Namespace, *keys: str) -> dict[str, Any]:
    common = ("responses", "tokens", "microbatch", "layers", "hidden", "vocab", "k", "precision", "repeats")
    return {key: getattr(options, key) for key in (*common, *keys)}


def run_step(options: argparse.Namespace) -> int:
    device, settings = resolve_device(options.device), _settings(options, "layouts", "shares")
    results: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"), options.layers, options.hidden, options.vocab)
        for layout in options.layouts:
            size, parallel = LAYOUTS[layout]
            arguments = ([str(model)], parallel, settings, device)
            with ProcessGroup(size, Steps, *arguments, device=device, threads=options.threads) as group:
                measures = {
                    share: (lambda s=share: group.call("step", 0, options.responses, options.tokens, s / 100))
                    for share in options.shares
                }
                found = alternate(measures, options.repeats)
            entries = {share: _step_entry(share, found[share], found[options.shares[0]]) for share in options.shares}
            results[layout] = list(entries.values())
            for share, entry in entries.items():
                rows.append(
                    [
                        layout,
                        f"{share:g}%",
                        shown(entry["seconds"]),
                        f"{100 * entry['of_full']:.1f}%",
                        f"{entry['efficiency']:.2f}",
                        f"{100 * entry['bubble']:.1f}%",
                        f"{entry['microbatches']}",
                    ]
                )
    print_table(
        f"training step, {options.layers} layers, hidden {options.hidden}, {options.responses} responses of "
        f"{options.tokens // 2} to {options.tokens} tokens after prompts of {PROMPT_TOKENS}",
        ("layout", "kept", "time: median, quartiles", "of the first", "efficiency", "idle", "micro-batches"),
        rows,
        left=2,
    )
    print(
        "efficiency: share of the time / share of the tokens, 1 is ideal; idle: mean over ranks of the time spent on "
        "waiting for and talking to other stages or replicas"
    )
    write_json(Path(options.json), "step", settings, results, device)
    return 0


def _step_entry(share: float, runs: list[list[dict]], full: list[list[dict]]) -> dict[str, Any]:
    """`runs` and `full`: for each repeat what every rank returned; `full` is of the first share, usually 100%."""

    def seconds(found: list[list[dict]]) -> dict[str, Any]:
        return summary([max(r["seconds"] for r in ranks) for ranks in found])

    own, whole = seconds(runs), seconds(full)
    idle = [sum(r["idle"] for r in ranks) / sum(r["seconds"] for r in ranks) for ranks in runs]
    ratio = own["median"] / whole["median"]
    return {
        "share": share,
        "seconds": own,
        "of_full": ratio,
        "efficiency": ratio / (share / 100),
        "bubble": summary(idle)["median"],
        "microbatches": max(r["microbatches"] for r in runs[0]),
    }


def run_scaling(options: argparse.Namespace) -> int:
    device, settings = resolve_device(options.device), _settings(options, "doublings", "ranks")
    factors = [2**i for i in range(options.doublings + 1)]
    with tempfile.TemporaryDirectory() as folder:
        models = [
            str(make_model(Path(folder, f"model{f}"), options.layers * f, options.hidden, options.vocab))
            for f in factors
        ]
        groups = {
            n: ProcessGroup(
                n, Steps, models if n == 1 else models[:1], {}, settings, device, device=device, threads=options.threads
            )
            for n in sorted({1, *options.ranks})
        }
        try:
            found = alternate(_scaling_measures(options, groups, factors), options.repeats)
        finally:
            for group in groups.values():
                group.close()
    axes = {
        "layers": [options.layers * f for f in factors],
        "sequence length": [options.tokens * f for f in factors],
        "batch": [options.responses * f for f in factors],
        "data-parallel ranks": options.ranks,
    }
    results, rows = {}, []
    for axis, sizes in axes.items():
        times = [summary(found[axis, size]) for size in sizes]
        exponent = growth_exponent(sizes, [t["median"] for t in times]) if len(sizes) > 1 else float("nan")
        results[axis] = {"sizes": sizes, "seconds": times, "exponent": exponent}
        for size, seconds in zip(sizes, times):
            rows.append([axis, str(size), shown(seconds), f"{exponent:.2f}" if size == sizes[-1] else ""])
    print_table(
        f"training step around {options.layers} layers, {options.responses} responses of {options.tokens // 2} to "
        f"{options.tokens} tokens, 1 rank",
        ("what doubles", "size", "time: median, quartiles", "growth exponent"),
        rows,
    )
    write_json(Path(options.json), "scaling", settings, results, device)
    return 0


def _scaling_measures(options: argparse.Namespace, groups: dict[int, Any], factors: list[int]) -> dict[Any, Any]:
    """One measure per (axis, size)."""

    def measure(ranks: int, model: int, responses: int, tokens: int) -> Any:
        return lambda: max(r["seconds"] for r in groups[ranks].call("step", model, responses, tokens, 1.0))

    responses, tokens = options.responses, options.tokens
    found: dict[Any, Any] = {}
    for i, f in enumerate(factors):
        found["layers", options.layers * f] = measure(1, i, responses, tokens)
        found["sequence length", tokens * f] = measure(1, 0, responses, tokens * f)
        found["batch", responses * f] = measure(1, 0, responses * f, tokens)
    for ranks in options.ranks:
        found["data-parallel ranks", ranks] = measure(ranks, 0, responses, tokens)
    return found
