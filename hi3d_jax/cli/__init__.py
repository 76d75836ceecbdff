"""The `hi3d` command: one subcommand per job, errors in one line, nothing heavy imported before it is needed.

Each subcommand is a dataclass whose fields are its options and whose `run` does the job, in a module of its own.
Exit codes: 0 done; 2 something the user can change (named in one line on stderr); 130 interrupted. With HI3D_DEBUG=1
errors show their traceback. JAX's compiled programs are kept in the user's cache folder (HI3D_CACHE names another one,
HI3D_CACHE=off keeps none), so that only the first run pays for compiling.
"""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from hi3d_jax.cli.compiled_programs import keep_compiled_programs
from hi3d_jax.cli.doctor import Doctor
from hi3d_jax.cli.evaluate import Evaluate
from hi3d_jax.cli.generate import Generate
from hi3d_jax.cli.output import explained, plain_warnings
from hi3d_jax.cli.reconstruct import Reconstruct
from hi3d_jax.cli.refine import Refine
from hi3d_jax.cli.render import Render
from hi3d_jax.cli.views import Views
from hi3d_jax.cli.warmup import Warmup

COMMANDS: dict[str, type] = {
    "generate": Generate,
    "views": Views,
    "refine": Refine,
    "reconstruct": Reconstruct,
    "render": Render,
    "evaluate": Evaluate,
    "warmup": Warmup,
    "doctor": Doctor,
}

DESCRIPTION = """Hi3D in JAX: from one image to views all around the object, and from views to a textured mesh.

examples:
  hi3d generate photo.png -o out --model models/hi3d
  hi3d views photo.png -o out --model models/hi3d && hi3d refine out -o refined --model models/hi3d
  hi3d reconstruct orbit.mp4 -o out
  hi3d render example -o rocket_orbit && hi3d reconstruct rocket_orbit -o rocket

hi3d COMMAND --help tells more; HI3D_DEBUG=1 shows tracebacks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        print(f"hi3d {importlib.metadata.version('hi3d_jax')}")
        return 0
    if argv and argv[0] in COMMANDS:
        command = tyro.cli(COMMANDS[argv[0]], prog=f"hi3d {argv[0]}", args=argv[1:])
    else:
        command = tyro.cli(_any_command(), prog="hi3d", description=DESCRIPTION, args=argv)
    keep_compiled_programs()
    try:
        with plain_warnings():
            command.run()
    except KeyboardInterrupt:
        print(f"hi3d: interrupted{way_back(command)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("HI3D_DEBUG") == "1" or not (text := explained(error)):
            raise
        print(f"hi3d: error: {text}{way_back(command) if isinstance(error, OSError) else ''}", file=sys.stderr)
        return 2
    return 0


def _any_command() -> Any:
    """The union that `hi3d --help` lists: each command with the first line of its docstring."""
    described = [
        Annotated[command, subcommand(name, description=command.__doc__.partition("\n")[0])]
        for name, command in COMMANDS.items()
    ]
    return functools.reduce(operator.or_, described)


def way_back(command: object) -> str:
    """How to go on after an interruption, for commands that keep what they finished."""
    return "; what is finished is kept, continue with --resume" if hasattr(command, "resume") else ""
