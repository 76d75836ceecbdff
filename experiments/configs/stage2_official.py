"""Stage 2 as the released code trains it (HI3D.md section 6): 17 input channels, degraded views only.

The paper's stage 2 (section 4.3) with other choices. Lightning's scaling of the learning rate makes 1e-5 into 8e-5.
fp16 there, bfloat16 here.

Hardware: eight GPUs of one orbit each there; for TPUs see stage2.
Expected: a model like the released second_stage.pt, for which no number of its own is published; the paper has 24.26 dB
for both stages (table 1). Not run here.

    python converters/convert.py svd_xt_image_decoder.safetensors --init stage2 -o svd_stage2_official
    python experiments/train.py --config=stage2_official --start=svd_stage2_official \\
        --task.networks svd_stage2_official DPT_FOLDER --data.folder=DATASET
"""

from hi3d_jax.data.degrade import Degradation
from hi3d_jax.data.loader import CoarseConfig
from hi3d_jax.models.unet import UNetConfig
from hi3d_jax.stages.recipe import Recipe
from hi3d_jax.training.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import StageTask


def get_config() -> TrainConfig:
    return TrainConfig(
        task=StageTask(
            recipe=Recipe.official(2),
            unet=UNetConfig(in_channels=17, vector_dim=512, remat="block"),
            views_at_a_time=1,
        ),
        folder="runs/stage2_official",
        steps=20_000,
        precision="bfloat16",
        data=DataConfig(
            batch_size=8, image_size=1024, workers=4, coarse=CoarseConfig(Degradation(masked=0.0), stage1_share=0.0)
        ),
        optimizer=OptimizerConfig(learning_rate=8e-5, clip_norm=0.0, decay_vectors=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
