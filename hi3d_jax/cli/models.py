"""What the commands that run models have in common: which model, and what it computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from hi3d_jax.stages.model import StageModel
    from hi3d_jax.stages.pipeline import Hi3DPipeline

Model = Annotated[str, arg(aliases=["-m"], metavar="tiny|FOLDER|HUB_ID")]
Elevation = Annotated[float | Literal["auto"], arg(metavar="DEGREES|auto")]
Dtype = Literal["auto", "float32", "bfloat16"]
ByRecipe = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by the model's recipe)")]


MemoryBudget = Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: none)")]


def open_model(
    source: str, stage: Literal[1, 2], dtype: Dtype, memory_budget: str | None, num_devices: int
) -> StageModel:
    """The model of a stage; says what it will hold in memory, where there is a budget for that.

    Raises `DeviceError` or `MemoryBudgetError`, and what `StageModel` raises.
    """
    import jax

    from hi3d_jax.stages.devices import DeviceError
    from hi3d_jax.stages.memory import parse_budget
    from hi3d_jax.stages.pipeline import open_stage

    budget = None if memory_budget is None else parse_budget(memory_budget)
    there = jax.devices()
    if not 1 <= num_devices <= len(there):
        raise DeviceError(f"--num-devices {num_devices}: there are {len(there)} devices here")
    devices = None if num_devices == 1 else there[:num_devices]
    model = open_stage(source, stage, dtype=chosen_dtype(dtype), memory_budget=budget, devices=devices)
    if model.memory_plan is not None:
        print(f"{model.name} will hold {model.memory_plan.describe()}", flush=True)
    return model


def open_pipeline(source: str, dtype: Dtype, memory_budget: str | None, num_devices: int) -> Hi3DPipeline:
    """The models of stage 1 and, where the source holds one, of stage 2; see `open_model`."""
    from hi3d_jax.pretrained import stage_folders
    from hi3d_jax.stages.pipeline import Hi3DPipeline
    from hi3d_jax.stages.recipe import Recipe

    settings = dtype, memory_budget, num_devices
    generator = open_model(source, 1, *settings)
    refines = any(Recipe.of(folder).stage == 2 for folder in stage_folders(source))
    return Hi3DPipeline(generator, open_model(source, 2, *settings) if refines else None)


def chosen_dtype(dtype: Dtype) -> Any:
    """What `StageModel` takes; None where it decides."""
    return None if dtype == "auto" else dtype
