"""Trains a network of Hi3D: python experiments/train.py --config=NAME [--FIELD=VALUE ...]

NAME is a file of experiments/configs (stage1, stage2_tiny, ...) or the path of another such file, whose get_config()
gives a TrainConfig. Every field can be changed, nested ones by dots: --config=stage2 --optimizer.learning_rate=3e-4.
The same command continues a run that was stopped, killed or interrupted. --config=NAME --help lists all fields.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python looks beside it for modules, where ours would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from hi3d_jax.training.config import TrainConfig
from hi3d_jax.training.loop import TrainingStopped, train

CONFIGS = Path(__file__).resolve().parent / "configs"


def load_config(name: str) -> TrainConfig:
    """The config of a file of experiments/configs by its name, or of a file by its path. Raises `ValueError`."""
    path = CONFIGS / f"{name}.py" if (CONFIGS / f"{name}.py").is_file() else Path(name)
    if not (path.suffix == ".py" and path.is_file()):
        names = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.py")))
        raise ValueError(f"--config={name} is neither a file nor one of {names}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def overview() -> str:
    """The configs with the first line of each one's text."""
    lines = [f"  {path.stem:20} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}" for path in _files()]
    return "configs:\n" + "\n".join(lines)


def _files() -> list[Path]:
    return sorted(CONFIGS.glob("*.py"))


def parse(arguments: list[str] | None) -> tuple[TrainConfig, bool]:
    """The resolved config, and whether changes to a stored one are accepted. Raises `ValueError`, `SystemExit`."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first,
        epilog=f"{rest}\n{overview()}",
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="NAME", help="name or path of a config")
    parser.add_argument("--accept-changes", action="store_true", help="continue a run although its config differs")
    parser.add_argument("-h", "--help", action="store_true", help="show this text; with --config, all its fields")
    known, overrides = parser.parse_known_args(arguments)
    if known.config is None:
        parser.print_help()
        raise SystemExit(0 if known.help else 2)
    default = load_config(known.config)
    overrides += ["--help"] if known.help else []
    config = tyro.cli(
        TrainConfig,
        prog=f"train.py --config={known.config}",
        description=first,
        default=default,
        args=overrides,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    return config, known.accept_changes


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if the run reached its last step."""
    try:
        config, accept_changes = parse(arguments)
        train(config, accept_changes=accept_changes)
    except (ValueError, OSError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
