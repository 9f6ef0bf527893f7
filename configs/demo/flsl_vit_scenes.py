"""A first look at FLSL pre-training: a small ViT on the demo's own scenes, minutes on a CPU.

    tools/pretrain_net.py --config-file configs/demo/flsl_vit_scenes.py --num-gpus 2

The recipe for small data (configs/pretrain/flsl_vit_mini_p8_small_data.py), on scenes that ``make
demo`` makes (flsl_d2.scenes) below $DETECTRON2_DATASETS/flsl_scenes.
"""

from ..pretrain.flsl_vit_mini_p8_small_data import (  # noqa: F401
    dataloader,
    dataset,
    model,
    schedules,
    train,
    views,
)

dataset.name = "flsl_scenes_train"

dataloader.update(total_batch_size=32)
train.update(
    max_iter=300,
    log_period=10,
    checkpoint_period=100,
    pictures_period=100,
    health_period=100,
    output_dir="./output/demo/pretrain",
)
