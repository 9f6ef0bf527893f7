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
from torch import Tensor, nn

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid
from pretrain.benchmark.report import print_table, write_json
from pretrain.benchmark.timing import stored_for_backward, time_in_turn

__all__ = ["benchmark_detection", "pyramids"]

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def pyramids(size: str, image_side: int, use_rel_pos: bool) -> dict[str, nn.Module]:
    """ViTDet's backbone by Detectron2 and by this project: windows of 14, four global blocks.

    Args:
        size: ``s``, ``b`` or ``l``, patch 16.
        image_side: pixels of the square images that positions are made for.
        use_rel_pos: decomposed relative positions.
    """
    width, depth, heads = SIZES[size]
    blocks = [i for i in range(depth) if (i + 1) % (depth // 4)]
    theirs = detectron2_vit.ViT(
        img_size=image_side,
        patch_size=16,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=14,
        window_block_indexes=blocks,
        use_rel_pos=use_rel_pos,
        pretrain_use_cls_token=False,
        pretrain_img_size=image_side,
        out_feature="last_feat",
    )
    ours = FLSLViT(
        img_size=image_side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        window_size=14,
        global_block_indexes=[i for i in range(depth) if i not in blocks],
        use_rel_pos=use_rel_pos,
        final_norm=False,
        learned_positions=True,
    )
    shared = {k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}
    ours.load_state_dict(shared)
    arguments: dict[str, Any] = {
        "in_feature": "last_feat",
        "out_channels": 256,
        "scale_factors": (4.0, 2.0, 1.0, 0.5),
        "top_block": LastLevelMaxPool(),
        "norm": "LN",
    }
    return {
        "detectron2": detectron2_vit.SimpleFeaturePyramid(
            net=theirs, square_pad=image_side, **arguments
        ),
        "flsl_d2": SimpleFeaturePyramid(net=ours, square_pad=image_side, **arguments),
    }


def _images(batch_size: int, side: int, device: torch.device) -> list[dict[str, Any]]:
    """Noise with ten boxes and masks an image, as Detectron2's models take it."""
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
    """Images/s and memory of training steps and inference, ours and Detectron2's in turn."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    mixed = torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=args.precision in ("bf16", "auto") and device.type == "cuda",
    )
    pixels = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    inputs = _images(args.batch_size, args.size, device)
    steps: dict[str, Callable[[], Any]] = {}
    stored: dict[str, int] = {}
    for name, backbone in pyramids(args.model, args.size, args.rel_pos).items():
        model = backbone if args.backbone_only else _mask_rcnn(backbone)
        model.to(device)
        forward = partial(_loss, model, pixels if args.backbone_only else inputs, mixed)
        steps[f"{name}, training"] = partial(_train, model, forward)
        steps[f"{name}, inference"] = partial(
            _infer, model, pixels if args.backbone_only else inputs, mixed
        )
        stored[f"{name}, training"] = stored_for_backward(forward, model.train())
    timings = time_in_turn(steps, args.repeats, args.warmup, device)
    rows = []
    for name, timing in timings.items():
        base = timings[name.replace("flsl_d2", "detectron2")]
        rows.append(
            {
                "what": name,
                "images/s": timing.rate(args.batch_size),
                "ratio to detectron2": timing.speed_against(base),
                "peak GiB": timing.peak_gib,
                "GiB/image kept for backward": stored[name] / args.batch_size / 2**30
                if name in stored
                else None,
            }
        )
    what = "backbone and pyramid" if args.backbone_only else "Mask R-CNN"
    print(
        f"{what}, ViT-{args.model.upper()}/16, {args.size} x {args.size}, batch {args.batch_size}, "
        f"relative positions {'on' if args.rel_pos else 'off'}, {device}, "
        f"{torch.get_num_threads()} thread(s), median of {args.repeats} in turn"
    )
    print_table(rows)
    write_json(args.json, device, rows=rows, arguments={k: str(v) for k, v in vars(args).items()})


def _mask_rcnn(backbone: nn.Module) -> nn.Module:
    cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py", [])
    cfg.model.backbone = None
    model = instantiate(cfg.model)
    model.backbone = backbone
    return model


def _loss(model: nn.Module, inputs: Any, mixed: torch.autocast) -> Tensor:
    model.train()
    with mixed:
        out = model(inputs)
        if isinstance(inputs, Tensor):
            return sum(level.float().square().mean() for level in out.values())
        return sum(out.values())


def _train(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    forward().backward()


@torch.no_grad()
def _infer(model: nn.Module, inputs: Any, mixed: torch.autocast) -> None:
    model.eval()
    with mixed:
        model(inputs)
