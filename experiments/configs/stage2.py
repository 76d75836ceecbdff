"""Stage 2 as the paper trains it (section 4.3 and "Implementation Details"): 16 views of 1024 x 1024 pixels.

20,000 steps of 8 orbits at 5e-5, from Stable Video Diffusion. One channel of depth, as the paper's text has it. Coarse
views are degraded ones, mixed with outputs of stage 1 where `data.stage1_folder` has some.

Hardware: about 3 days on eight A100 of 80 GB in the paper.
Expected: 24.26 dB PSNR on the paper's test set, from stage 1's 22.09 (its table 3). Not run here: it needs weights and
machines that this project has not had.

One orbit takes 23 GiB beside the weights: more than a chip of v5e has, which --mesh.views mends by splitting each
orbit's views over chips. 8 orbits on 64 v5e are --mesh.views=8 --task.views_at_a_time=8: 10 of 15.75 GiB (XLA's own
count of bytes; see experiments/benchmarks/RESULTS.md).

    python converters/convert.py svd_xt_image_decoder.safetensors --init stage2_paper -o svd_stage2
    python experiments/train.py --config=stage2 --start=svd_stage2 \\
        --task.networks svd_stage2 DPT_FOLDER --data.folder=DATASET
"""

from hi3d_jax.data.loader import CoarseConfig
from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import StageTask


def get_config() -> TrainConfig:
    return TrainConfig(
        task=StageTask(
            recipe=Recipe.paper(2),
            unet=UNetConfig(in_channels=9, vector_dim=512, remat="block"),
            views_at_a_time=1,
        ),
        folder="runs/stage2",
        steps=20_000,
        precision="bfloat16",
        data=DataConfig(batch_size=8, image_size=1024, workers=4, coarse=CoarseConfig()),
        optimizer=OptimizerConfig(learning_rate=5e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
