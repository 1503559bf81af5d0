"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opd.trackers.base import Tracker, TrackerSetup


class TensorBoard(Tracker):
    """Scalars; a table's rows as text. Steps that a resume runs again are purged."""

    def __init__(self, setup: TrackerSetup) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board: Any = SummaryWriter(str(Path(setup.run_dir, "tensorboard")), purge_step=setup.first_step)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        for number, row in enumerate(rows):
            lines = (f"{column}: {value}" for column, value in zip(columns, row, strict=True))
            text = "\n".join(f"    {line}" for part in lines for line in part.splitlines())  # an indented block of code
            self.board.add_text(f"{name}/{number}", text, step)

    def close(self) -> None:
        self.board.close()
