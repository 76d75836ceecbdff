"""Runs the notebooks from top to bottom and keeps their outputs in them.

    python experiments/notebooks/execute.py                # all of them
    python experiments/notebooks/execute.py 2_splatting

Needs `pip install .[notebooks]`. A notebook that raises stops the run, and its file stays as it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent


def notebooks() -> list[Path]:
    """All of them, in their order."""
    return sorted(FOLDER.glob("[0-9]_*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of this run. Raises `CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    settings = {"timeout": 600, "kernel_name": "python3", "resources": {"metadata": {"path": str(FOLDER)}}}
    client = NotebookClient(notebook, **settings)
    client.execute()
    for cell in notebook.cells:
        # When a cell ran is no result: without it a run that gives the same leaves the same file.
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Runs those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(path.stem for path in notebooks())], metavar="NAME")
    chosen = parser.parse_args().names
    for path in notebooks():
        if chosen and path.stem not in chosen:
            continue
        try:
            executed = execute(path)
        except CellExecutionError as error:
            sys.exit(f"error: {path.name}: {error}")
        nbformat.write(executed, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
