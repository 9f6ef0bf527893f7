"""FLSL pre-training of ViT-S/16 on ImageNet-1k (arXiv 2306.06203).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py --num-gpus 8

ImageNet lies in $DETECTRON2_DATASETS/imagenet/train. ``dataset.root=FOLDER`` takes any other tree
of images, ``dataset.name=coco_2017_train`` the images of a data set registered in Detectron2, and
``train.device=cpu`` trains on a CPU.

Hardware and time: the paper's run took 8 GPUs for 3.5 days. Mask R-CNN fine-tuned from its weights
reaches 44.9 box and 40.8 mask AP on COCO (1x). These are figures of the paper.
"""

import os

from detectron2.config import LazyCall as L

from flsl_d2.modeling import VIT_SIZES as _SIZES
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.methods.previous_stage import load_previous_stage
from pretrain.schedules import Schedules
from pretrain.views import NestedViews

dataset = dict(
    # Folder below which every image is used; ImageNet's layout or any other. Or a folder of shards
    # (tools/make_shards.py), or the URL of either.
    root=os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "imagenet", "train"),
    # Data set registered in Detectron2; where given, it is used and root is not.
    name="",
    # A file that cannot be read: "skip" counts, names and replaces it, "raise" stops.
    on_error="skip",
    # Share of the images that may be skipped before the run stops, 0 to 1.
    max_failed_share=0.1,
    # An image of more pixels counts as one that cannot be read.
    max_pixels=100_000_000,
    # Number of channels whose stored values are used, for greyscale, 16-bit and multispectral
    # images; 0 reads every image as RGB of 8 bits. Mean and standard deviation of each channel are
    # computed from the images where none are given.
    channels=0,
    pixel_mean=[],
    pixel_std=[],
    # Images of a URL that are kept on the local disk, in 10^9 bytes; the folder "" is ~/.cache.
    cache_gb=0.0,
    cache_dir="",
    # Seconds that a failing server is asked again before the run writes a checkpoint and ends.
    patience=60.0,
)

views = L(NestedViews)(
    patch_size="${model.backbone.patch_size}",
    global_size=224,
    local_size=96,
    num_local=2,
    teacher_scale=(0.8, 1.0),
    global_scale=(0.5, 1.0),
    local_scale=(0.05, 0.4),
    global_window=3,
    local_window=2,
    random_pooling=True,
    # Probability that a view is mirrored; the published run has no flips.
    flip=0.0,
    # Strength of the photometric augmentation, 0 to 1.
    photometry=1.0,
    # Work of the training device instead of the workers: "nothing", "augmentation", or "crops" (the
    # student's crops and the augmentation); for GPUs that wait for their images.
    on_device="nothing",
    # Decode JPEG files at half their size or less where the teacher's crop stays large enough; for
    # images of twice the view's size or more.
    reduced_decoding=False,
)

dataloader = dict(
    # Number of images in a step, of all processes. The learning rate scales with it.
    total_batch_size=512,
    # Number of decoding processes of a training process; 0 decodes in the training process.
    num_workers=8,
    # Number of batches that each of them prepares ahead.
    prefetch_factor=2,
)

model = L(FLSL)(
    backbone=L(FLSLViT)(
        img_size="${views.global_size}",
        patch_size=16,
        **_SIZES["small"],
        drop_path_rate=0.1,
        use_act_checkpoint=False,
    ),
    head=L(FLSLHead)(
        in_dim="${model.backbone.embed_dim}",
        num_centroids=4096,
        hidden_dim=2048,
        bottleneck_dim=256,
        learn_scale=False,
    ),
    loss=L(FLSLLoss)(
        num_centroids="${model.head.num_centroids}",
        inter_weight=1.0,
        volume_weight=5.0,
        student_temp=0.1,
        sinkhorn_steps=0,
    ),
    # Training in stages: the teacher_backbone.pth of an earlier run, which must have the same
    # patch size, guides the attention towards the teacher's view; see schedules.mixture_bias.
    previous_stage=L(load_previous_stage)(weights="", num_blocks=None, scale=0.2, sharpness=1e4),
    # Encode the student's views of all sizes in one pass; faster, same result.
    pack_views=True,
    # Against features that are a map of places (docs/METHOD.md); the published run is as here.
    partner="similarity",
    position_drop=0.0,
    position_share=1.0,
    image_share=1.0,
    token_share=1.0,
    prediction_blocks=0,
)

# Pairs are start and end of a cosine over the run; see pretrain/schedules.py.
schedules = L(Schedules)(
    base_lr=5e-4,
    final_lr=1e-6,
    warmup_fraction=0.1,
    weight_decay=(0.04, 0.4),
    teacher_momentum=(0.996, 1.0),
    teacher_temp=(0.04, 0.07),
    teacher_temp_epochs=30,
    intra_weight=(0.03, 0.03),
    self_scale=(0.1, 0.1),
    cross_scale=(0.2, 0.2),
    mixture_bias=1.0,
    frozen_last_layer_epochs=1,
    # Share of the run in which the encoder is not trained, for a run with train.init_checkpoint.
    frozen_encoder_fraction=0.0,
)

train = dict(
    # Checkpoints, metrics.json, log.txt, TensorBoard events, teacher_backbone.pth.
    output_dir="./output/flsl_vit_small_p16_in1k",
    # Weights that the encoder starts from, and whose architecture it gets; "": random weights.
    init_checkpoint="",
    # Length of the run in epochs, and in steps: 0 derives the steps from the epochs.
    epochs=300,
    max_iter=0,
    # "cuda" or "cpu".
    device="cuda",
    # "fp32", "bf16", "fp16"; "auto": bf16 on GPUs that compute in it, fp16 on others, fp32 on CPU.
    precision="auto",
    # Number of parts in which a process works off its images of a step, to save memory; the volume
    # term then looks at the mean of a part.
    accumulation_steps=1,
    # torch.compile for the transformer blocks: True, False, or "auto" on GPUs alone.
    compile="auto",
    # Mode of torch.compile; "reduce-overhead" and "max-autotune" record CUDA graphs of the blocks.
    compile_mode="default",
    # Products of float32 matrices in TF32 on GPUs that have it; for precision="fp32".
    tf32=False,
    # Momentums of AdamW.
    betas=(0.9, 0.999),
    # Batch norm, of heads and of encoders that have it, over the batches of all processes.
    sync_bn=True,
    # Largest norm of a gradient, taken "per_tensor" (as published), "global" or not ("none").
    clip_norm=3.0,
    clip_mode="per_tensor",
    # Seed of weights, views, order of images and stochastic depth.
    seed=0,
    # Steps between two lines on the console.
    log_period=20,
    # Trackers beside TensorBoard: a list of "wandb" and "mlflow".
    trackers=[],
    # Steps between two checkpoints, and how many are kept; those whose number of steps is a
    # multiple of checkpoint_keep_every are kept, too (0: none).
    checkpoint_period=5000,
    checkpoint_keep=3,
    checkpoint_keep_every=0,
    # Training goes on while a checkpoint is written; the last one is waited for.
    checkpoint_async=True,
    # Steps between two pages of pictures of the teacher's tokens, in pictures/ and TensorBoard;
    # 0: none. All GPUs wait for a page, so one is left out where they would take a larger share of
    # the time.
    pictures_period=1000,
    pictures_max_share=0.02,
    # Steps between two sentences about the health of the run; 0: only at the end.
    health_period=1000,
    # Scores of the teacher's frozen tokens: registered data sets to learn from and to score on ("":
    # none), steps between two scores (0: at the end), largest number of images of each, largest
    # share of the time, for which all GPUs wait (scores that come too early are left out).
    measures=dict(train="", val="", period_iters=0, max_images=200, max_share=0.2),
)
