"""Mask R-CNN on FLSLViT with a simple feature pyramid, as ViTDet (arXiv 2203.16527) builds it.

The detector around the encoder is Detectron2's Mask R-CNN with LayerNorm in pyramid and heads,
2 convolutions in the RPN and 4 convolutions + 1 linear layer in the box head.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

# The pixels that the encoder was pre-trained on.
model.input_format = "RGB"
model.pixel_mean = list(IMAGENET_MEAN)
model.pixel_std = list(IMAGENET_STD)

model.backbone = L(SimpleFeaturePyramid)(
    net=L(FLSLViT)(
        # Side of the images of pre-training, which the position table is made for.
        img_size=224,
        # ViT-S/16; these must be the values of the weights in train.init_checkpoint.
        patch_size=16,
        embed_dim=384,
        depth=12,
        num_heads=6,
        mlp_ratio=4.0,
        qkv_bias=True,
        final_norm=True,
        # Stochastic depth of the last block.
        drop_path_rate=0.1,
        # Side of the attention windows in tokens, and the blocks without windows (null: four,
        # evenly spread).
        window_size=14,
        global_block_indexes=None,
        # Leave the padding of windows out of attention.
        mask_window_padding=False,
        # Relative positions as in ViTDet; they start at zero if the weights have none.
        use_rel_pos=False,
        rel_pos_img_size=None,
        # Offset of the position table's resampling (0.1 as in pre-training), and its training.
        position_offset=0.1,
        learned_positions=False,
        # Train pyramid and heads alone; the encoder stays as its weights are.
        frozen=False,
        # Compute blocks again in the backward pass: about a third slower, a fraction of the memory.
        use_act_checkpoint=False,
    ),
    in_feature="last_feat",
    out_channels=256,
    # null: strides 4, 8, 16, 32 for any patch size.
    scale_factors=None,
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    # Side of the squares that images are padded to; 0 pads only to the coarsest stride.
    square_pad=0,
)

model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = "LN"
model.roi_heads.mask_head.conv_norm = "LN"
