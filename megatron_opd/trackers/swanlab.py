"""SwanLab, in RUN/swanlab without the cloud where SWANLAB_MODE is local or offline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_opd.trackers.base import Tracker, TrackerSetup


class SwanLab(Tracker):
    """One SwanLab run for all starts of a run."""

    def __init__(self, setup: TrackerSetup) -> None:
        import swanlab

        self.swanlab: Any = swanlab
        self.run: Any = swanlab.init(
            project=setup.project,
            name=setup.name,
            id=setup.own_id("swanlab"),
            resume="allow",
            log_dir=str(Path(setup.run_dir, "swanlab")),
            mode=os.environ.get("SWANLAB_MODE", "online"),
            config=setup.config | {"notes": setup.notes},
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.swanlab.log(values, step=step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        texts = ["\n".join(f"{c}: {v}" for c, v in zip(columns, row, strict=True)) for row in rows]
        self.swanlab.log({name: [self.swanlab.Text(text) for text in texts]}, step=step)

    def close(self) -> None:
        self.swanlab.finish()
