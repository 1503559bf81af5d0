"""Old module names, kept importable for one release; the changelog's MIGRATION section lists them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "evaluation.answers": "evaluation.responses",
    "launch": "runtime.launch",
    "losses.full": "losses.full_vocabulary",
    "losses.gathered": "losses.candidates",
    "models.bridge": "weights.bridge",
    "models.converted": "weights.converted",
    "models.hf_export": "weights.export",
    "models.hf_files": "weights.hf_files",
    "models.parameters": "weights.parameters",
    "models.platform": "compat.cpu_platform",
    "models.weights": "weights.loading",
    "preflight": "runtime.preflight",
    "rollout.sampler": "rollout.megatron.sampler",
    "training.compare": "commands.compare",
    "training.doctor": "commands.doctor",
    "training.evaluate": "commands.evaluate",
    "training.guard": "runtime.guard",
    "training.lock": "runtime.lock",
    "training.precision_shift": "commands.precision_shift",
    "weights.hf_export": "weights.export",
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module under its old name: the same module object, with a DeprecationWarning that names the new one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != __package__ or module not in MOVED:
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        # The import system stamps the spec that it looked up on the module; the module keeps its own.
        spec.loader_state = (module.__spec__, module.__loader__, module.__package__, module.__name__)
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        if spec.loader is self:
            module.__spec__, module.__loader__, module.__package__, module.__name__ = spec.loader_state


def install() -> None:
    """Called once, where the package is imported."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
