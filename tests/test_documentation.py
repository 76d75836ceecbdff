"""README and continuous integration cannot drift: CI runs the README's own blocks, and those name real options."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from hi3d_jax import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def shell_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def hi3d_commands() -> list[list[str]]:
    """Every call of `hi3d` in the README's shell blocks, as words."""
    commands = []
    for line in "\n".join(shell_blocks()).replace("\\\n", " ").splitlines():
        for call in line.split("&&"):
            words = shlex.split(call, comments=True)
            if words[:1] == ["hi3d"]:
                commands.append(words[1:])
    return commands


@pytest.mark.parametrize("name", ["main", "test"])
def test_ci_finds_the_readmes_commands(name):
    script = (ROOT / ".ci/run").read_text()
    block = script[script.index("block() {") : script.index("\nfor name")]
    result = subprocess.run(
        ["bash", "-c", f"{block}\nblock {name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout in shell_blocks()
    assert "pip install -r requirements.txt" in result.stdout


def test_ci_script_is_executable_and_valid():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


@pytest.mark.parametrize("words", hi3d_commands(), ids=" ".join)
def test_the_readmes_hi3d_commands_parse(words, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setenv("HI3D_CACHE", "off")
    monkeypatch.setattr(cli.COMMANDS[words[0]], "run", lambda command: calls.append(command))
    assert cli.main(words) == 0
    assert len(calls) == 1


def test_options_named_in_the_readme_exist(capsys):
    helps = []
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        helps.append(capsys.readouterr().out)
    mentioned = set(re.findall(r"`(--[a-z-]+)`", README))
    assert mentioned
    for option in mentioned:
        assert re.search(rf"{option}\b", "\n".join(helps)), f"README names {option}, which no command has"


def test_requirements_pin_every_dependency():
    """Each direct dependency, the tests' included, is pinned to one version inside pyproject's range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    requirements = [match.groups() for text in wanted if (match := re.match(r"([A-Za-z0-9_-]+).*>=([0-9.]+)", text))]
    assert len(requirements) > 10
    assert {"jax", "pytest", "ruff"} < {name for name, _ in requirements}
    for name, lowest in requirements:
        version = pinned[name.lower().replace("_", "-")]
        number = [int(part) for part in re.findall(r"\d+", version)]
        assert number >= [int(part) for part in lowest.split(".")], f"{name} {version} is below {lowest}"
