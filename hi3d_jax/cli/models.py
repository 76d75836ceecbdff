"""What the commands that run models have in common: which model, and what it computes in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from tyro.conf import arg

Model = Annotated[str, arg(aliases=["-m"], metavar="FOLDER")]
Dtype = Literal["auto", "float32", "bfloat16"]
ByRecipe = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by the model's recipe)")]


def chosen_dtype(dtype: Dtype) -> Any:
    """What `StageModel` takes; None where it decides."""
    return None if dtype == "auto" else dtype
