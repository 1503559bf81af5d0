"""Trackio: on this machine, or in a Space that TRACKIO_SPACE_ID names; `trackio show` opens it."""

from __future__ import annotations

from typing import Any

from megatron_opd.trackers.base import Tracker, TrackerSetup


class Trackio(Tracker):
    """One Trackio run for all starts of a run."""

    def __init__(self, setup: TrackerSetup) -> None:
        import trackio

        self.trackio: Any = trackio
        self.run: Any = trackio.init(
            project=setup.project,
            name=f"{setup.name} {setup.own_id('trackio')[:6]}",  # a run is known by its name alone
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            config=setup.config | {"notes": setup.notes},
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import pandas

        self.trackio.log({name: self.trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)

    def close(self) -> None:
        self.trackio.finish()
