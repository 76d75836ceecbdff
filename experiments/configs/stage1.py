"""Stage 1 as the paper trains it (section 4.2 and "Implementation Details"): 16 views of 512 x 512 pixels.

80,000 steps of 16 orbits at 1e-5, from Stable Video Diffusion. Where the paper is silent the released code decides
(HI3D.md section 6), except for clipping.

Hardware: about 3 days on eight A100 of 80 GB in the paper.
Expected: 22.09 dB PSNR on the paper's test set without the second stage (its table 3), 24.26 dB with it (table 1). Not
run here: it needs weights and machines that this project has not had.

On TPU four chips of v5e hold a step of four orbits, and 64 a step of 64 (XLA's own count of bytes; see
experiments/benchmarks/RESULTS.md). For more chips than orbits --mesh.views splits each orbit's views over chips: 16
orbits on 64 chips are --mesh.views=4; 16 on four chips --optimizer.accumulate=4. Those two have not been compiled.

    python converters/convert.py svd_xt_image_decoder.safetensors --init stage1_paper -o svd_stage1
    python experiments/train.py --config=stage1 --start=svd_stage1 \\
        --task.networks svd_stage1 --data.folder=DATASET
"""

from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import StageTask


def get_config() -> TrainConfig:
    return TrainConfig(
        task=StageTask(
            recipe=Recipe.paper(1),
            unet=UNetConfig(vector_dim=512, remat="block"),
            views_at_a_time=4,
        ),
        folder="runs/stage1",
        steps=80_000,
        precision="bfloat16",
        data=DataConfig(batch_size=16, image_size=512, workers=4),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every_steps=3000),
    )
