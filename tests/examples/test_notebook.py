"""The notebook runs from beginning to end on the runs that lie beside it; its kept outputs are of such a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.tiny_run import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "tiny" / "compare_runs.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """The kinds of outputs of each cell of code."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [" ".join(sorted({output.output_type for output in cell.outputs})) for cell in cells]


def test_the_notebook_runs() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    again = nbformat.read(NOTEBOOK, as_version=4)
    for cell in again.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(again, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert outputs(again) == outputs(kept) and all(outputs(kept))
    tables = [o.data["text/plain"] for cell in again.cells for o in cell.get("outputs", ()) if "data" in o]
    assert any("in_flight" in table and "loss" in table for table in tables)


def test_the_kept_notebook_names_no_folder_of_a_machine() -> None:
    text = Path(NOTEBOOK).read_text()
    assert str(REPOSITORY) not in text and "/home/" not in text and "/tmp/" not in text
