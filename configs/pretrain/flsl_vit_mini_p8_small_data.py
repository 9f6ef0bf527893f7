"""FLSL for ten thousand images and little hardware (arXiv 2306.06203, with the keys of small data).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_mini_p8_small_data.py \\
        --num-gpus 1 dataset.root=FOLDER

A ViT of 1.2 million weights (128 wide, 6 blocks, patches of 8) on views of 80 pixels: 40 images a
second on one CPU core, so that 18,000 images are passed through twice in a quarter of an hour.
With the published objective such a run ends as a map of places; these keys prevent it
(docs/METHOD.md, "Against features that are a map of places"). Expected: propagated masks 14 points
of J&F above untrained weights, and a linear probe 2 points of mIoU; with train.max_iter=6250, an
hour, 19 and 3. docs/records/objects_2026-11.md has the figures, and what did not improve.
"""

from .flsl_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

dataset.name, dataset.root = "", ""

model.backbone.update(patch_size=8, embed_dim=128, depth=6, num_heads=4, drop_path_rate=0.0)
model.head.update(num_centroids=256, hidden_dim=256, bottleneck_dim=128)
# Targets come from the place of a token and may hold little of the place and of the image alone;
# tokens that the encoder does not see are predicted from those that it sees.
model.update(
    partner="place",
    position_share=0.01,
    image_share=0.15,
    position_drop=0.1,
    token_share=0.4,
    prediction_blocks=1,
)
# A small batch cannot estimate the volume term; balanced targets take its place.
model.loss.update(sinkhorn_steps=3, volume_weight=0.0)
views.update(
    global_size=80, local_size=40, global_window=1, local_window=1, flip=0.5, photometry=0.1
)
dataloader.update(total_batch_size=16, num_workers=0)
schedules.update(
    base_lr=16e-3,
    warmup_fraction=0.04,
    weight_decay=(0.04, 0.04),
    teacher_momentum=(0.99, 1.0),
    teacher_temp=(0.04, 0.04),
    self_scale=(2.0, 2.0),
    cross_scale=(4.0, 4.0),
    frozen_last_layer_epochs=0,
)
train.update(
    device="cpu",
    max_iter=2000,
    log_period=50,
    checkpoint_period=500,
    pictures_period=0,
    output_dir="./output/flsl_vit_mini_p8_small_data",
)
