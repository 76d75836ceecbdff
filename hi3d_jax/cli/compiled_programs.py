"""Where JAX's compiled programs are kept from one run to the next, and when a long run lets go of them."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path


def keep_compiled_programs() -> None:
    """Points JAX's persistent compilation cache at the user's cache folder, unless the environment already says where.

    Takes effect through the environment, before JAX is imported. A folder that cannot be written only costs time.
    """
    chosen = os.environ.get("HI3D_CACHE")
    if chosen == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(chosen) if chosen else user_cache_folder() / "hi3d"
    try:
        (folder / "xla").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "xla"):
            pass
    except OSError as error:
        print(f"hi3d: compiled programs are not kept: {folder} cannot be written ({error.strerror})", file=sys.stderr)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    # Below this, compiling again is as fast as looking the program up.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def let_go_of_programs(most_mapped: int | None = None) -> None:
    """To be called after each of many objects: forgets compiled programs before they are too many for the process.

    XLA's programs for a CPU take hundreds to thousands of mapped pieces of memory each, of which Linux gives a process
    65,530 (vm.max_map_count); one too many ends it. From `most_mapped` pieces (half of what there may be) all programs
    are dropped; those that are needed again come from the persistent cache.
    """
    try:
        if most_mapped is None:
            most_mapped = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
        mapped = Path("/proc/self/maps").read_text().count("\n")
    except OSError:
        return  # Other systems have no such limit.
    if mapped > most_mapped:
        import jax

        jax.clear_caches()
        gc.collect()


def user_cache_folder() -> Path:
    """The platform's folder for files that can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
