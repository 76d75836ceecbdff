"""Files and folders that appear whole under their name, or not at all.

So a crash, a full disk or Ctrl-C never leaves half of something under a name that a later run would trust.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path` to write a file to, then renames it to `path`, replacing what stood there.

    On an error nothing is left of it, and what stood at `path` stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def made_aside(path: str | Path) -> Iterator[Path]:
    """`written_aside` for a new file or folder and its parents. Raises `FileExistsError` where `path` exists."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside / path.name
        os.rename(aside / path.name, path)
    finally:
        shutil.rmtree(aside)
