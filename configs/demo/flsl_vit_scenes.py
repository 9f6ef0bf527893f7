"""A first look at FLSL pre-training: a small ViT on the demo's own scenes, minutes on a CPU.

    tools/pretrain_net.py --config-file configs/demo/flsl_vit_scenes.py --num-gpus 2

The scenes are made by ``make demo`` (flsl_d2.data.scenes) below $DETECTRON2_DATASETS/flsl_scenes.
"""

from ..pretrain.flsl_vit_small_p16_in1k import (
    dataloader,
    dataset,
    model,
    schedules,
    train,
    views,
)

dataset.name = "flsl_scenes_train"

model.backbone.update(patch_size=8, embed_dim=128, depth=6, num_heads=4, drop_path_rate=0.0)
model.head.update(num_centroids=256, hidden_dim=512, bottleneck_dim=128)
views.update(global_size=80, local_size=48, global_window=2)
dataloader.update(total_batch_size=32, num_workers=0)

# A run of minutes has a higher learning rate and a faster teacher, and freezes or warms up nothing
# by epochs. The scales give the narrower features the kernel width that 0.1 and 0.2 give those of
# ViT-S. With 0.6 and 1.2 the losses fall much further, because tokens find their own place in the
# teacher's view by position alone, and the features hold little else.
schedules.update(
    base_lr=8e-3,
    teacher_momentum=(0.98, 1.0),
    teacher_temp=(0.04, 0.04),
    self_scale=(0.17, 0.17),
    cross_scale=(0.35, 0.35),
    frozen_last_layer_epochs=0,
)
train.update(
    device="cpu",
    max_iter=300,
    log_period=10,
    pictures_period=100,
    health_period=100,
    output_dir="./output/demo/pretrain",
)
