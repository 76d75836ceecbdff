"""Configs: all are sound and survive JSON, the command line is strict and explains, another run's config is refused."""

import ast
import dataclasses
import json
import re

import pytest

from experiments.train import CONFIGS, load_config, main, parse
from hi3d_jax.pretrained import config_from_dict, config_to_dict
from hi3d_jax.training.config import OptimizerConfig, TrainConfig, differences, flat
from hi3d_jax.training.loop import store_config

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_sound_and_comes_back_from_json(name):
    config = load_config(name)
    assert config_from_dict(TrainConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    header = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    for part in (f"--config={name}", "Hardware: ", "Expected: "):
        assert part in header, "its header must give command, machine and result"
    assert re.search(r"section \d|the paper's table \d", header), "its header must say what it reproduces"


def test_full_size_configs_have_the_papers_numbers():
    for name, steps, batch, rate in (("stage1", 80_000, 16, 1e-5), ("stage2", 20_000, 8, 5e-5)):
        config = load_config(name)
        assert (config.steps, config.data.batch_size, config.optimizer.learning_rate) == (steps, batch, rate)
    assert load_config("stage1_official").optimizer.learning_rate == pytest.approx(16 * 1e-5)
    official = load_config("stage2_official")
    assert official.task.unet.in_channels == 17
    # The released code masks nothing and has no outputs of stage 1 among its coarse views (HI3D.md section 6).
    assert (official.data.coarse.degradation.masked, official.data.coarse.stage1_share) == (0, 0)


def test_the_command_line_overrides_typed_fields_and_refuses_others(capsys):
    config, accept = parse(["--config=stage2", "--optimizer.learning_rate=3e-4", "--task.unet.remat=none"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.task.unet.remat == "none"
    assert not accept
    assert config.task == dataclasses.replace(
        load_config("stage2").task, unet=dataclasses.replace(load_config("stage2").task.unet, remat="none")
    )
    for wrong in ("--optimizer.lr=3", "--steps=many"):
        with pytest.raises(SystemExit) as stopped:
            parse(["--config=stage2", wrong])
        assert stopped.value.code == 2
        assert wrong.split("=")[0].strip("-") in capsys.readouterr().err
    assert main(["--config=nothing"]) == 1
    assert "stage1_tiny" in capsys.readouterr().err


def test_help_lists_every_field_with_a_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--config=stage2_tiny", "--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, value in flat(load_config("stage2_tiny")).items():
        # Groups of fields that are left out are for config files to put in: an image encoder, parameter groups.
        if name in ("task.image_encoder", "optimizer.groups"):
            assert not value
            continue
        option = "--" + name.replace("_", "-")
        found = re.search(re.escape(option) + r" (?:[^-]|-[^-])*?\(default", shown)
        assert found, f"{option} is not listed"
        words = re.findall(r"\b[A-Za-z][a-z]+\b", found.group()[len(option) :])
        assert len(words) >= 3, f"{option} has no line of help: {found.group()}"


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match="decay_steps"):
        OptimizerConfig(schedule="cosine")
    with pytest.raises(ValueError, match="accumulate=3"):
        dataclasses.replace(load_config("stage1"), optimizer=OptimizerConfig(accumulate=3))
    task = load_config("stage1_tiny").task
    wide = dataclasses.replace(task, networks=(), unet=dataclasses.replace(task.unet, in_channels=9))
    with pytest.raises(ValueError, match="in_channels is 9, not 8"):
        wide.trained()


def test_a_run_is_continued_by_its_own_config_only(tmp_path, capsys):
    config = load_config("stage1_tiny")
    store_config(tmp_path, config)
    longer = dataclasses.replace(config, steps=config.steps + 1)
    store_config(tmp_path, longer)
    assert "steps: 60000 -> 60001" in capsys.readouterr().out
    other = dataclasses.replace(longer, optimizer=OptimizerConfig(learning_rate=1.0), seed=1)
    with pytest.raises(ValueError, match=r"seed: 0 -> 1.*optimizer.learning_rate: 0.001 -> 1.0"):
        store_config(tmp_path, other)
    store_config(tmp_path, other, accept_changes=True)
    assert differences(longer, other)[1]
