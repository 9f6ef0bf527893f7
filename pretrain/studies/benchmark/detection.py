"""Mask R-CNN and its backbone against Detectron2's own ViT and pyramid, with the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone import vit as detectron2_vit
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import VIT_SIZES, FLSLViT, SimpleFeaturePyramid
from flsl_d2.modeling.vit import evenly_spread_blocks
from pretrain.studies.benchmark.measuring import (
    prepared_device,
    report,
    stored_for_backward,
    time_in_turn,
)
from pretrain.trainer import PRECISIONS, resolve_precision

SIZES = {"s": VIT_SIZES["small"], "b": VIT_SIZES["base"], "l": VIT_SIZES["large"]}


def pyramids(size: str, image_side: int, use_rel_pos: bool) -> dict[str, nn.Module]:
    """Build ViTDet's backbone by Detectron2 and by this project, with the same weights.

    Both have windows of 14 tokens and four global blocks.

    Args:
        size: ``s``, ``b`` or ``l``, with patches of 16 pixels.
        image_side: side in pixels of the square images that positions are made for.
        use_rel_pos: whether attention has decomposed relative positions.
    """
    depth = SIZES[size]["depth"]
    global_blocks = evenly_spread_blocks(depth)
    common: dict[str, Any] = {
        **SIZES[size],
        "img_size": image_side,
        "window_size": 14,
        "use_rel_pos": use_rel_pos,
    }
    reference = detectron2_vit.ViT(
        **common,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[i for i in range(depth) if i not in global_blocks],
        pretrain_use_cls_token=False,
        pretrain_img_size=image_side,
        out_feature="last_feat",
    )
    own = FLSLViT(
        **common, global_block_indexes=global_blocks, final_norm=False, learned_positions=True
    )
    shared = {k: v for k, v in reference.state_dict().items() if k in own.state_dict()}
    own.load_state_dict(shared)
    arguments: dict[str, Any] = {
        "in_feature": "last_feat",
        "out_channels": 256,
        "scale_factors": (4.0, 2.0, 1.0, 0.5),
        "top_block": LastLevelMaxPool(),
        "norm": "LN",
    }
    return {
        "detectron2": detectron2_vit.SimpleFeaturePyramid(
            net=reference, square_pad=image_side, **arguments
        ),
        "flsl_d2": SimpleFeaturePyramid(net=own, square_pad=image_side, **arguments),
    }


def _images(batch_size: int, side: int, device: torch.device) -> list[dict[str, Any]]:
    """Make images of noise with ten boxes and masks each, as Detectron2's models take them."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(batch_size):
        corner = torch.rand(10, 2, generator=generator) * side * 0.6
        extent = (torch.rand(10, 2, generator=generator) * 0.3 + 0.1) * side
        boxes = torch.cat([corner, corner + extent], dim=1)
        masks = torch.zeros(10, side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((side, side))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, 80, (10,), generator=generator)
        instances.gt_masks = BitMasks(masks)
        pixels = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
        inputs.append({"image": pixels, "instances": instances.to(device)})
    return inputs


def benchmark_detection(args: argparse.Namespace) -> None:
    """Measure training steps and inference of this project and of Detectron2 in turn."""
    device = prepared_device(args)
    precision = resolve_precision(args.precision, device.type)
    dtype = PRECISIONS[precision]
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    inputs: Any
    if args.backbone_only:
        inputs = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    else:
        inputs = _images(args.batch_size, args.size, device)

    def build(name: str) -> Callable[[], object]:
        torch.manual_seed(0)  # both get the same detector
        backbone = pyramids(args.model, args.size, args.rel_pos)[name.partition(",")[0]]
        model = (backbone if args.backbone_only else _mask_rcnn(backbone)).to(device)
        if name.endswith("inference"):
            return torch.no_grad()(mixed(partial(model.eval(), inputs)))

        def loss() -> Tensor:
            """Return the detector's loss, or a number that depends on all outputs of a backbone."""
            with mixed, EventStorage():  # the detector's heads write to the storage
                out = model(inputs)
                if args.backbone_only:
                    return sum(level.float().square().mean() for level in out.values())
                return sum(out.values())

        return _Training(model.train(), loss)

    sides = ("detectron2", "flsl_d2")
    names = [f"{side}, {what}" for side in sides for what in ("training", "inference")]
    makers = {name: partial(build, name) for name in names}
    timings = time_in_turn(makers, args.repeats, args.warmup, device)
    rows = []
    for name, timing in timings.items():
        step, kept = timing.function, None
        if isinstance(step, _Training):
            kept = stored_for_backward(step.loss, step.model) / args.batch_size / 2**30
        base = timings[name.replace("flsl_d2", "detectron2")]
        rows.append(
            {
                "what": name,
                "images/s": timing.rate(args.batch_size),
                "ratio to detectron2": timing.speed_against(base),
                "peak GiB": timing.peak_gib,
                "GiB/image kept for backward": kept,
            }
        )
    what = "backbone and pyramid" if args.backbone_only else "Mask R-CNN"
    title = (
        f"{what}, ViT-{args.model.upper()}/16, {args.size} x {args.size}, batch {args.batch_size}, "
        f"relative positions {'on' if args.rel_pos else 'off'}, {precision} on {device}, "
        f"{torch.get_num_threads()} thread(s), median of {args.repeats} in turn"
    )
    given = {key: str(value) for key, value in vars(args).items()}
    report(title, rows, device, args.json, arguments=given)


def _mask_rcnn(backbone: nn.Module) -> nn.Module:
    cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py", [])
    cfg.model.backbone = None
    model = instantiate(cfg.model)
    model.backbone = backbone
    return model


class _Training:
    """Forward and backward pass."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()
