"""Whether what a config can generate fits the models and the engine, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from megatron_opd.config import DEFAULT_TEACHER, Config, ConfigError, ModelConfig
from megatron_opd.data.prompts import PromptSet
from megatron_opd.weights.bridge import read_hf_config, rope_parameters
from megatron_opd.weights.families import own_family


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and response that this config can reach, in training or evaluation."""
    return config.data.max_prompt_tokens + max([config.prune.budget.maximum, *(s.max_tokens for s in config.eval.sets)])


def positions_of(hf_config: PretrainedConfig) -> int:
    """Positions that a model is made for: max_position_embeddings, which linear and yarn scaling may extend."""
    parameters, limit = rope_parameters(hf_config), int(hf_config.max_position_embeddings)
    factor = float(parameters.get("factor") or 1.0)
    if parameters["rope_type"] == "linear":
        return int(limit * factor)
    if parameters["rope_type"] == "yarn":
        return max(limit, int((parameters.get("original_max_position_embeddings") or limit) * factor))
    return limit


def check_lengths(config: Config, training: PromptSet | None, evaluation: Iterable[tuple[str, int, PromptSet]]) -> None:
    """Raises ConfigError, listing everything, where a sequence would go beyond the positions that a model is made for
    (it would compute, but nothing that the model has learnt) or beyond what vLLM is started with.

    `training`: None where nothing is trained. `evaluation`: name, max_tokens and prompts of each data set.
    """
    student_config = _hf_config("student", config.student)
    student = positions_of(student_config)
    # What the student generates: what asks for it, the longest prompt, the longest response and its key.
    wanted = [(f"eval set {name}", p.longest, n, "its max_tokens") for name, n, p in evaluation]
    if training is not None:
        wanted.append(("data.prompts", training.longest, config.prune.budget.maximum, "prune.budget.maximum"))
    problems = [
        _too_long(f"student.model: {config.student.model}", student, *case)
        for case in wanted
        if sum(case[1:3]) > student
    ]
    if training is not None:
        case = (wanted[-1][0], training.longest_of_teacher, *wanted[-1][2:])
        for name, settings in config.teacher_by_name.items():
            key = "teacher" if name == DEFAULT_TEACHER else f"teachers[{name}]"
            positions = positions_of(_hf_config(key, settings))
            if sum(case[1:3]) > positions:
                problems.append(_too_long(f"{key}.model: {settings.model}", positions, *case))
    if config.rollout.engine == "vllm":
        problems += _vllm_problems(config, student, wanted)
        heads = student_config.num_attention_heads
        if config.rollout.vllm.mode == "colocate" and heads % config.rollout.vllm.tensor:
            problems.append(
                f"rollout.vllm.tensor: {config.rollout.vllm.tensor} does not divide the {heads} attention heads"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _hf_config(name: str, model: ModelConfig) -> PretrainedConfig:
    return read_hf_config(model.model, own_family(f"{name}.family", model.family))


def _too_long(model: str, limit: int, source: str, prompt: int, response: int, key: str) -> str:
    fits = f"lower {key} to {limit - prompt}" if prompt < limit else f"leave out prompts of {limit} tokens and more"
    return (
        f"{model} has {limit} positions (max_position_embeddings), the longest prompt of {source} ({prompt} tokens) "
        f"and {key}: {response} need {prompt + response}; {fits}, or raise max_position_embeddings in its config.json "
        "if the model is made for more"
    )


def _vllm_problems(config: Config, positions: int, wanted: list[tuple[str, int, int, str]]) -> list[str]:
    given, reach, problems = config.rollout.vllm.max_model_len, longest_sequence(config), []
    colocated = config.rollout.vllm.mode == "colocate"  # a server is started with the model's own positions
    if given is None and colocated and reach > positions:
        longest = max(prompt for _, prompt, _, _ in wanted)
        problems.append(
            f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and the longest response make {reach} tokens: "
            f"vLLM is started for them; {config.student.model} has {positions} positions (max_position_embeddings); "
            f"lower data.max_prompt_tokens (the longest prompt has {longest}) or set "
            f"rollout.vllm.max_model_len: {positions}"
        )
    if given is not None and given > positions:
        problems.append(
            f"rollout.vllm.max_model_len: {given} is more than the {positions} positions (max_position_embeddings) of "
            f"{config.student.model}; set {positions} or less"
        )
    for source, prompt, response, key in wanted:
        if given is not None and prompt + response > given:
            problems.append(
                f"rollout.vllm.max_model_len: {given} is less than the {prompt + response} tokens of the longest "
                f"prompt of {source} ({prompt}) and {key}: {response}; raise it, set it to null, or lower {key}"
            )
    return problems
