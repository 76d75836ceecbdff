"""hi3d-tiny's autoencoder: latents of an eighth of the image's size, learnt from single views.

Rombach et al. 2022, section 3.1, without a discriminator. A 128-pixel view becomes 16 x 16 x 4 numbers. (Hi3D takes
Stable Video Diffusion's as it is: paper section 3.)

Hardware: two CPU cores, 0.7 s a step of 16 views beside other work.
Expected: views of 25 held-out objects come back at 26.6 dB PSNR after 6,134 steps, 1.2 hours (where the package's was
ended, with the learning rate lowered by hand: hi3d_jax/weights/tiny/training_log.md).

    python experiments/train.py --config=autoencoder_tiny --data.folder=DATASET --data.validation_folder=DATASET2 \\
        --task.lpips=LPIPS_MODEL_FOLDER --folder=runs/autoencoder_tiny
"""

from hi3d_jax.models.vae import AutoencoderConfig
from hi3d_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import AutoencoderTask


def get_config() -> TrainConfig:
    return TrainConfig(
        task=AutoencoderTask(
            vae=AutoencoderConfig(
                block_channels=(32, 32, 64, 128), layers_per_block=1, latent_channels=4, norm_groups=4
            ),
            crop=64,
            colour_weight=2.0,
        ),
        folder="runs/autoencoder_tiny",
        steps=40_000,
        data=DataConfig(batch_size=8, num_views=2, image_size=128, category_power=0.5),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=200, ema_decay=0.999),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=25, samples_every_steps=500, validate_every_steps=500, validation_batches=4),
    )
