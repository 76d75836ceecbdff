"""What a stage will hold is what its compiled programs state, and a budget is kept or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hi3d_jax.cli import main
from hi3d_jax.pretrained import abstract_network
from hi3d_jax.stages import memory
from hi3d_jax.stages.memory import MemoryBudgetError, parse_budget, plan_memory
from hi3d_jax.stages.programs import Chunking, make_programs
from hi3d_jax.stages.random_model import random_networks, write_random_model
from hi3d_jax.stages.recipe import Recipe

RECIPE = dataclasses.replace(Recipe.paper(1), num_views=4, image_size=64)
HELD = 10**9


@pytest.fixture(scope="module", autouse=True)
def _hurry(tmp_path_factory):
    """A process that holds a gigabyte, compiles in a hurry and compiles nothing twice."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])
        patch.setattr(memory, "held_bytes", lambda: HELD)
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def plan(budget: int) -> memory.MemoryPlan:
    return plan_memory(RECIPE, random_networks(RECIPE), budget, [jnp.float32])


@pytest.fixture(scope="module")
def roomy() -> memory.MemoryPlan:
    return plan(10**12)


def test_what_is_fast_comes_first_and_what_is_frugal_where_it_must(roomy):
    assert roomy.chunking == Chunking(1, 1, split_guidance=False)
    tight = plan(roomy.peak - 1)
    assert tight.chunking.split_guidance
    assert tight.peak < roomy.peak
    with pytest.raises(MemoryBudgetError, match="smallest budget that works is") as error:
        plan(HELD)
    # The number that the error gives is one that works.
    assert parse_budget(str(error.value).rsplit(" is ", 1)[1]) >= tight.peak


def test_a_plan_counts_parameters_whole_and_temporaries(roomy):
    networks = {name: abstract_network(*size) for name, size in random_networks(RECIPE).items()}
    program = make_programs(RECIPE, networks)["denoise_step"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.params))
    assert 4 * parameters < memory.argument_bytes(program) < roomy.programs["denoise_step"]
    assert roomy.peak == max(roomy.programs.values()) + roomy.held
    assert roomy.held > HELD


@pytest.mark.parametrize(("text", "count"), [("12GB", 12 * 10**9), ("1.5 gib", 3 * 2**29), ("800MB", 8 * 10**8)])
def test_budgets_are_read_as_people_write_them(text, count):
    assert parse_budget(text) == count


def test_the_command_refuses_what_cannot_be(tmp_path, capsys):
    write_random_model(tmp_path / "stage1", RECIPE)
    command = ["views", "photo.png", "-o", str(tmp_path / "out"), "--model", str(tmp_path / "stage1")]
    (tmp_path / "photo.png").touch()
    command[1] = str(tmp_path / "photo.png")
    assert main([*command, "--memory-budget", "12 parsecs"]) != 0
    assert "'12 parsecs' is no amount of memory: write it like 12GB" in capsys.readouterr().err
    assert main([*command, "--memory-budget", "900MB", "--dtype", "float32"]) != 0
    assert "does not fit into 0.90 GB; the smallest budget that works is 1." in capsys.readouterr().err
    assert main([*command, "--num-devices", "9"]) != 0
    assert "--num-devices 9: there are 8 devices here" in capsys.readouterr().err
