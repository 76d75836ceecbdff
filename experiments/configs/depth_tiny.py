"""hi3d-tiny's depth network: disparity of single views, learnt from rendered depths.

MiDaS's loss (Ranftl et al. 2020) and DPT-hybrid's architecture (Ranftl et al. 2021) at small size. It makes the depth
condition of paper section 4.3, for which the paper takes a trained network as it is. It learns from what the second
stage will show it, degraded views of 256 pixels made 96 wide, one in four of them clean.

Hardware: two CPU cores.
Expected: the disparity of degraded views of held-out objects to a mean error of .034 of their range [0, 1], after 3,500
steps, 2,000 of them on four objects, 1.3 hours on one core. Of four objects, 2,000 steps learn it to .010
(experiments/benchmarks/overfit.py).

    python experiments/train.py --config=depth_tiny --data.folder=DATASET --data.validation_folder=DATASET2
"""

from hi3d_jax.data.loader import CoarseConfig
from hi3d_jax.models.depth_backbone import DPTConfig
from hi3d_jax.training.config import CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from hi3d_jax.training.tasks import DepthTask


def get_config() -> TrainConfig:
    return TrainConfig(
        task=DepthTask(
            depth=DPTConfig(
                image_size=96,
                stem_width=32,
                stage_widths=(128, 128, 256),
                stage_depths=(1, 1, 2),
                width=96,
                mlp_width=384,
                num_layers=4,
                num_heads=3,
                tap_layers=(1, 3),
                tap_widths=(64, 64),
                fusion_width=64,
            )
        ),
        folder="runs/depth_tiny",
        steps=20_000,
        data=DataConfig(
            batch_size=4, num_views=4, image_size=256, category_power=0.5, depths=True, coarse=CoarseConfig()
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=200, ema_decay=0.999),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=25, samples_every_steps=500, validate_every_steps=500),
    )
