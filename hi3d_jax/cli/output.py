"""The output folder of a command, and what went wrong in one line with the remedy."""

from __future__ import annotations

import contextlib
import errno
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

REMEDIES = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.EROFS: "choose a folder that can be written",
}

Output = Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]


class OutputError(ValueError):
    """Output that cannot be made, or not where it was asked for; the text names it and the remedy."""


def prepare_output(folder: Path, resume: bool, source: Path | None = None) -> None:
    """Makes the output folder, or raises `OutputError` where writing there would fail or destroy something.

    A folder that holds anything is only taken with `resume`; `source`, from which the run reads, is never taken.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder with -o")
    if source is not None and folder.resolve() == source.resolve():
        raise OutputError(f"{folder} is the input; give another folder with -o")
    if folder.is_dir() and not resume:
        if _holds_run(folder):
            raise OutputError(f"{folder} already holds a run; continue it with --resume, or give a new folder with -o")
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise OutputError(f"{folder} is not empty; give a new folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = REMEDIES.get(error.errno, "choose another folder with -o")
        raise OutputError(f"{folder} cannot be written ({error.strerror}); {remedy}") from error


def _holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder, or in a folder of it, as commands with several results have them."""
    return any(any(folder.glob(f"{depth}run.json")) for depth in ("", "*/", "*/*/"))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows what the library warns of in one line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"hi3d: warning: {message}", file=sys.stderr)
        yield


@contextlib.contextmanager
def script_errors(*more: type[Exception]) -> Iterator[None]:
    """Ends a script of experiments/ that can be run again: one line for what a user can mend, and after Ctrl-C.

    That is `ValueError`, `OSError` and `more`.
    """
    try:
        yield
    except (ValueError, OSError, *more) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")


def explained(error: Exception) -> str:
    """What went wrong and what to do, in one line; empty for an error that no user can cause."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; use --quality draft, smaller views or fewer of them"
    if isinstance(error, RuntimeError):
        return ""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno, "check the path")
        return f"{error.filename or 'writing'}: {error.strerror}; {remedy}"
    # Our own errors are subclasses; a bare ValueError may come from anywhere.
    hint = " (HI3D_DEBUG=1 shows where)" if type(error) is ValueError else ""
    return " ".join(str(error).split()) + hint
