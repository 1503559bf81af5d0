"""Several teachers: whose response is whose. With one teacher everything here is that one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megatron_opd.models.model import Model
from megatron_opd.types import Prompt, Rollout, TeacherScores


@dataclass(frozen=True)
class Teachers:
    """The models that judge, by name, the default one first, and the names of sources' teachers."""

    models: Mapping[str, Model]
    of_source: Mapping[str, str]

    @property
    def default(self) -> Model:
        return next(iter(self.models.values()))

    def name_of(self, prompt: Prompt) -> str:
        """The prompt's teacher: its source's, or the default one."""
        return self.of_source.get(prompt.source, next(iter(self.models)))

    def members(self, rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
        """Positions of the responses of each teacher that has any, in the teachers' order: a teacher is brought in once
        a step. The same on every rank."""
        members: dict[str, list[int]] = {name: [] for name in self.models}
        for i, r in enumerate(rollouts):
            members[self.name_of(r.prompt)].append(i)
        return {name: its_own for name, its_own in members.items() if its_own}

    def judge(
        self, rollouts: list[Rollout], score: Callable[[Model, list[Rollout]], list[TeacherScores]]
    ) -> list[TeacherScores]:
        """Every response scored by its own teacher; one teacher after the other is on the device. Collective."""
        scores: dict[int, TeacherScores] = {}
        for name, members in self.members(rollouts).items():
            teacher = self.models[name]
            with teacher.resident():
                scores |= zip(members, score(teacher, [rollouts[i] for i in members]), strict=True)
        return [scores[i] for i in range(len(rollouts))]

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The parameters of all of them are on the device inside."""
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(model.resident())
            yield
