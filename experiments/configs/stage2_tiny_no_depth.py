"""hi3d-tiny's second stage without the depth condition: the third row of the paper's table 3.

All else is as in stage2_tiny; experiments/ablations.py table3 --without-depth compares the two.

Hardware: two CPU cores.
Expected: worse than stage2_tiny, as 23.12 is than 24.26 dB in the paper's table 3: on held-out objects by .017 in
LPIPS, .004 in SSIM and 0.1 dB; on four objects learnt by heart it was 0.12 dB better instead, on unseen orbits of four
objects 0.24 dB, in 4 steps (experiments/benchmarks/RESULTS.md).

    python experiments/train.py --config=stage2_tiny_no_depth --task.networks STAGE1_FOLDER --data.folder=DATASET \\
        --data.validation_folder=DATASET2
"""

import dataclasses

from experiments.configs.stage2_tiny import get_config as get_config_with_depth
from hi3d_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = get_config_with_depth()
    task = config.task
    recipe = dataclasses.replace(task.recipe, concat=("coarse_latents",))
    unet = dataclasses.replace(task.unet, in_channels=task.unet.in_channels - task.recipe.depth_unfold**2)
    networks = tuple(folder for folder in task.networks if "depth" not in folder)
    task = dataclasses.replace(task, recipe=recipe, unet=unet, networks=networks)
    return dataclasses.replace(config, task=task, folder="runs/stage2_tiny_no_depth")
