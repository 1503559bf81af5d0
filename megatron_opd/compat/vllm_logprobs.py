"""Log-probs that vLLM keeps beside those that it has handed out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLMEngine


def forget_logprobs(engine: LLMEngine, request_id: str) -> None:
    """Drops what an LLMEngine of this process keeps of a running request's log-probs. Call it behind each step.

    An output of kind DELTA holds copies of the new positions; vLLM keeps those of the whole response beside them until
    it ends, as Python objects: about 100 bytes per candidate.
    """
    from vllm.logprobs import FlatLogprobs

    processor = engine.output_processor
    for internal in processor.external_req_ids.get(request_id, ()):
        kept = processor.request_states[internal].logprobs_processor
        if kept is not None:
            kept.logprobs = FlatLogprobs()
