#!/usr/bin/env python3
"""Make the golden files of the methods: two training steps of each by its authors' code, on a CPU.

Usage: ``python tests/golden/make_methods.py --official DIR [METHOD ...]``. DIR holds checkouts of
the repositories of :data:`SOURCES` under the names given there. Definitions are executed from these
files at run time, and none is copied. README.md says what a file holds.

The encoder is a toy ViT of the authors, or DINO's where they have another framework or a ResNet.
Every one is run without its class token, whose place the mean of the tokens takes, as everywhere in
this project: blocks pass over the token, and the final norm is followed by the mean.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import timm.layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

HERE = Path(__file__).resolve().parent
# Name of the checkout, repository and commit of each method.
SOURCES = {
    "dino": ("dino", "facebookresearch/dino", "7c446df5b9"),
    "ibot": ("ibot", "bytedance/ibot", "da316d8263"),
    "mae": ("mae", "facebookresearch/mae", "efb2a8062c"),
    "beit": ("unilm", "microsoft/unilm", "768a3c873f"),
    "maskfeat": ("SlowFast", "facebookresearch/SlowFast", "287ec00768"),
    "simclr": ("simclr", "google-research/simclr", "383d4143fd"),
    "moco_v3": ("moco-v3", "facebookresearch/moco-v3", "c349e6e24f"),
    "swav": ("swav", "facebookresearch/swav", "06b1b7cbaf"),
    "vicreg": ("vicreg", "facebookresearch/vicreg", "4e12602fd4"),
    "vicregl": ("VICRegL", "facebookresearch/VICRegL", "803ae4c8cd"),
    "densecl": ("DenseCL", "WXinlong/DenseCL", "b64bbb6e26"),
    "detcon": ("detcon", "google-deepmind/detcon", "dda05678d9"),
    "selfpatch": ("SelfPatch", "alinlab/SelfPatch", "81aef149fa"),
    "droppos": ("DropPos", "Haochen-Wang409/DropPos", "13f50a8372"),
}
MOMENTUM, TEMPERATURE, BATCH = 0.9, 0.05, 3
WIDTH, HIDDEN, OUTPUTS = 8, 8, 6
VIT = dict(img_size=[16], patch_size=4, embed_dim=WIDTH, depth=1, num_heads=2, qkv_bias=True)
MEAN, STD = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
EPS6 = partial(nn.LayerNorm, eps=1e-6)
OFFICIAL = Path()
random_weights = torch.Generator()


@dataclass
class Case:
    """Two steps of a method; names of tensors and modules are this project's."""

    groups: dict[str, Iterable[Tensor]]  # trained, in the order of the module's parameters
    step: Callable[[list[Tensor], int], dict[str, Tensor]]  # number of the step to its losses
    sizes: list[int] = field(default_factory=lambda: [16, 16])  # sides of the views in pixels
    after: Callable[[], None] = lambda: None  # called after the optimiser's step
    start: dict[str, Iterable[Tensor]] = field(default_factory=dict)  # what is not trained
    buffers: Callable[[], dict[str, Tensor]] = dict  # called after a step
    draws: dict[str, Tensor] = field(default_factory=dict)
    # Order of the rows of a group's last two tensors here, where the authors' differs.
    rows: dict[str, Tensor] = field(default_factory=dict)
    batch: int = BATCH
    # Of plain gradient descent; smaller where a step would magnify rounding errors.
    learning_rate: float = 0.1
    meta: dict[str, Any] = field(default_factory=dict)  # overrides and values of the tiny recipe


def take(path: str, *names: str, **others: Any) -> Any:
    """Execute the classes and functions of an official file, all or those of these names.

    ``others`` are further names that they use.
    """
    space: dict[str, Any] = {
        **dict(torch=torch, nn=nn, F=F, np=np, math=math, random=random, dist=dist, time=time),
        **dict(partial=partial, trunc_normal_=nn.init.trunc_normal_, os=os, json=None),
        **dict(drop_path=timm.layers.drop_path, to_2tuple=timm.layers.to_2tuple),
        **dict(PatchEmbed=timm_vit.PatchEmbed, Block=_timm_block),
        **others,
    }
    nodes = ast.parse((OFFICIAL / path).read_text()).body
    wanted = (ast.ClassDef, ast.FunctionDef)
    nodes = [n for n in nodes if isinstance(n, wanted) and (not names or n.name in names)]
    exec(compile(ast.Module(nodes, []), path, "exec"), space)
    return SimpleNamespace(**space)


def _timm_block(*args: Any, qk_scale: None = None, **options: Any) -> nn.Module:
    return timm_vit.Block(*args, **options)  # timm has dropped qk_scale


class WithoutToken(nn.Module):
    """A block that leaves the first token as it is and that the others do not see."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.cat([x[:, :1], self.block(x[:, 1:], *args, **options)], dim=1)


class MeanToken(WithoutToken):
    """A norm behind which the first token is the mean of the others."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        x = self.block(x[:, 1:])
        return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)


def prepare(network: nn.Module, side: int = 4) -> nn.Module:
    """Draw weights and positions, and take the class token out of an official ViT if it is one.

    No weight is zero and no norm is the identity. Weights are multiples of 1/128, so that the files
    are small.
    """
    norms = (nn.LayerNorm, nn.BatchNorm1d)
    shifted = {id(m.weight) for m in network.modules() if isinstance(m, norms) and m.affine_}
    for name, parameter in network.named_parameters():
        if name.endswith("weight_g"):
            continue
        noise = torch.randn(parameter.shape, generator=random_weights)
        if parameter.dim() > 1:
            noise *= 1.5 / parameter[0].numel() ** 0.5
        else:
            noise = 0.2 * noise + (id(parameter) in shifted)
        parameter.data.copy_((128 * noise).round() / 128)
    for module in network.modules():
        if hasattr(module, "pos_embed"):
            width = module.pos_embed.shape[-1]
            table = take("mae/util/pos_embed.py").get_2d_sincos_pos_embed(width, side)
            module.pos_embed.data.zero_()
            module.pos_embed.data[0, -len(table) :] = torch.from_numpy(table)
            module.pos_embed.requires_grad_(False)
        if hasattr(module, "cls_token") and hasattr(module, "patch_embed"):
            module.cls_token.data.zero_()
            module.cls_token.requires_grad_(False)
            for blocks in (module.blocks, getattr(module, "decoder_blocks", None)):
                for i in range(len(blocks or [])):
                    blocks[i] = WithoutToken(blocks[i])
            module.norm = MeanToken(module.norm)
    return network


nn.LayerNorm.affine_ = True  # type: ignore[attr-defined]
nn.BatchNorm1d.affine_ = property(lambda norm: norm.affine)  # type: ignore[attr-defined]


def dino_vit(**options: Any) -> nn.Module:
    """Build DINO's ViT in toy size."""
    options = {**VIT, "norm_layer": EPS6, **options}
    return take("dino/vision_transformer.py").VisionTransformer(**options)


class Pooled(nn.Module):
    """DINO's ViT as the ResNet of other authors' code: tokens, their map and their mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.vit = dino_vit(**options)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to tokens (B, N, D)."""
        x = self.vit.prepare_tokens(images)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(images).mean(dim=1)


def two_layers(outputs: int, bias: bool = False) -> nn.Sequential:
    """Build a head of PyTorch's layers."""
    layers = [nn.Linear(WIDTH, HIDDEN, False), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs, bias))


def trained(*modules: nn.Module) -> list[Tensor]:
    """Parameters of modules in their order, without those that never learn."""
    fixed = ("pos_embed", "cls_token", "fixed")
    named = [pair for module in modules for pair in module.named_parameters()]
    return [p for name, p in named if not name.endswith(fixed)]


def follow(teacher: Iterable[Tensor], student: Iterable[Tensor]) -> None:
    """Move a teacher: the loop that stands in the authors' training functions."""
    with torch.no_grad():
        for kept, new in zip(teacher, student, strict=True):
            kept.mul_(MOMENTUM).add_((1 - MOMENTUM) * new)


def statistics(**modules: nn.Module) -> dict[str, Tensor]:
    """Running statistics of batch norm of modules, one after the other."""
    found = {}
    for name, module in modules.items():
        values = [b for b in module.buffers() if b.is_floating_point()]
        found[f"{name.replace('__', '.')}.statistics"] = torch.cat(values)
    return found


def both(student: nn.Module, teacher: nn.Module, names: dict[str, str]) -> Any:
    """Groups of student and teacher by this project's names, from those of the authors."""
    found = []
    for prefix, network in (("student", student), ("teacher", teacher)):
        modules = {ours: network.get_submodule(theirs) for ours, theirs in names.items()}
        found.append({f"{prefix}.{ours}": trained(module) for ours, module in modules.items()})
    return found


def dino() -> Case:
    """DINO: main_dino.py, utils.py, vision_transformer.py."""
    vits = take("dino/vision_transformer.py")
    wrapper = take("dino/utils.py", "MultiCropWrapper").MultiCropWrapper
    sizes = dict(hidden_dim=HIDDEN, bottleneck_dim=HIDDEN, norm_last_layer=False)
    head = partial(vits.DINOHead, WIDTH, OUTPUTS, **sizes)
    student, teacher = (prepare(wrapper(dino_vit(), head())) for _ in range(2))
    loss = take("dino/main_dino.py", "DINOLoss").DINOLoss(OUTPUTS, 4, *[TEMPERATURE] * 2, 0, 1)
    groups, start = both(student, teacher, {"backbone": "backbone", "head": "head"})

    def step(views: list[Tensor], _: int) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = teacher(views[:2])
        return {"loss": loss(student(views), targets, 0)}

    after = partial(follow, [*teacher.parameters()], [*student.parameters()])
    return Case(groups, step, [16, 16, 8, 8], after, start, lambda: {"loss.center": loss.center})


def ibot_masks(side: int) -> Callable[[], Tensor]:
    """Return the function that draws iBOT's masks of a view."""
    loader = take("ibot/loader.py", "ImageFolderMask", ImageFolder=ImageFolder).ImageFolderMask
    folder = loader.__new__(loader)
    ratio = [math.log(0.3), math.log(1 / 0.3)]
    options = dict(psz=1, pred_ratio=[0, 0.3], pred_ratio_var=[0, 0.2], pred_shape="block")
    vars(folder).update(options, log_aspect_ratio=ratio, pred_start_epoch=0)
    image = ([torch.zeros(3, side, side)], 0)

    def draw() -> Tensor:
        with mock.patch.object(ImageFolder, "__getitem__", return_value=image):
            return torch.from_numpy(folder[0][-1][0])

    return draw


def ibot() -> Case:
    """iBOT: main_ibot.py, loader.py, utils.py, models/."""
    vits = take("ibot/models/vision_transformer.py")
    heads = take("ibot/models/head.py")
    head = partial(
        heads.iBOTHead, WIDTH, OUTPUTS, patch_out_dim=OUTPUTS, hidden_dim=HIDDEN,
        bottleneck_dim=HIDDEN, shared_head=True, norm_last_layer=False,
    )  # fmt: skip
    wrapper = take("ibot/utils.py", "MultiCropWrapper").MultiCropWrapper
    build = partial(vits.VisionTransformer, **VIT, return_all_tokens=True)
    student = prepare(wrapper(build(masked_im_modeling=True), head()))
    teacher = prepare(wrapper(build(), head()))
    temperatures = [TEMPERATURE] * 4
    loss = take("ibot/main_ibot.py", "iBOTLoss").iBOTLoss(
        OUTPUTS, OUTPUTS, 2, 1, *temperatures, 0, 1, lambda2=0.7
    )
    groups, start = both(student, teacher, {"backbone": "backbone", "head": "head"})
    token = student.backbone.masked_embed
    groups["student.backbone"] = [p for p in groups["student.backbone"] if p is not token]
    groups["student.mask_token"] = [token]
    draw, large = ibot_masks(4), ibot_masks(14)

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        random.seed(number)
        masks = torch.stack([draw() for _ in range(2 * BATCH)])
        with torch.no_grad():
            targets = teacher(views[:2])
        student.backbone.masked_im_modeling = True
        outputs = student(views[:2], mask=list(masks.chunk(2)))
        student.backbone.masked_im_modeling = False
        local = student(views[2:])[0]
        losses = loss(outputs, targets, local, list(masks.chunk(2)), 0)
        return {"loss": losses["loss"], "loss_global": losses["cls"]}

    def after() -> None:
        follow(start["teacher.backbone"], groups["student.backbone"])
        follow(start["teacher.head"], groups["student.head"])

    random.seed(7)
    masks = torch.stack([large() for _ in range(40)])
    return Case(
        groups, step, [16, 16, 8], after, start,
        lambda: {"loss.center": loss.center, "patch_loss.center": loss.center2},
        {"masks": masks}, meta={"overrides": ["model.patch_weight=0.7"]},
    )  # fmt: skip


def mae() -> Case:
    """MAE: models_mae.py, util/pos_embed.py."""
    positions = take("mae/util/pos_embed.py").get_2d_sincos_pos_embed
    models = take("mae/models_mae.py", get_2d_sincos_pos_embed=positions)
    model = models.MaskedAutoencoderViT(
        16, 4, 3, WIDTH, 1, 2, HIDDEN, 1, 2, norm_layer=EPS6, norm_pix_loss=True
    )
    prepare(model)
    positions_ = torch.from_numpy(positions(HIDDEN, 4, cls_token=True)).float()
    model.decoder_pos_embed.data.copy_(positions_[None])
    model.decoder_pos_embed.requires_grad_(False)

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        return {"loss": model(views[0], 0.75)[0]}

    # The authors have a patch's colours last, and this project first.
    rows = torch.arange(48).view(16, 3).T.flatten()
    groups = encoder_and_decoder(model, mask_token=model.mask_token)
    return Case(groups, step, [16], rows={"decoder": rows})


def encoder_and_decoder(model: Any, **token: Tensor) -> dict[str, Iterable[Tensor]]:
    """Groups of a model with a decoder and a learned token."""
    decoder = [model.decoder_embed, model.decoder_blocks, model.decoder_norm, model.decoder_pred]
    return {
        "student.backbone": trained(model.patch_embed, model.blocks, model.norm),
        **{name: [tensor] for name, tensor in token.items()},
        "decoder": trained(*decoder),
    }


def droppos() -> Case:
    """DropPos: models_DropPos_mae.py, engine_pretrain.py.

    The authors divide the columns of the smoothing map by the sums of its rows, where the paper has
    the rows; the map is symmetric, so its transpose is the paper's.
    """
    positions = take("mae/util/pos_embed.py").get_2d_sincos_pos_embed
    models = take("DropPos/models_DropPos_mae.py", get_2d_sincos_pos_embed=positions)
    model = models.DropPositionMaskedAutoEncoderViT(
        16, 4, 3, WIDTH, 1, 2, HIDDEN, 1, 2, norm_layer=EPS6, attn_guide=True
    )
    prepare(model)
    smooth = take("DropPos/engine_pretrain.py", "_get_label_smoothing_map")
    target = smooth._get_label_smoothing_map(16, 0.75).T

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        return {"loss": model(views[0], 0.5, 0.5, target)[1]}

    groups = encoder_and_decoder(model, dropped_position=model.mask_pos_token)
    return Case(groups, step, [16], meta={"values": {"progress": 0.25}})


def beit() -> Case:
    """BEiT: modeling_pretrain.py, modeling_finetune.py, masking_generator.py.

    The codes of the patches are drawn: the tokeniser here is another one. The loss is the line of
    engine_for_pretraining.py, cross-entropy.
    """
    parts = take("unilm/beit/modeling_finetune.py", "Block", "PatchEmbed", "Attention", "Mlp",
                 "DropPath")  # fmt: skip
    models = take("unilm/beit/modeling_pretrain.py", "VisionTransformerForMaskedImageModeling",
                  Block=parts.Block, PatchEmbed=parts.PatchEmbed)  # fmt: skip
    model = models.VisionTransformerForMaskedImageModeling(
        16, 4, 3, 9, WIDTH, 1, 2, qkv_bias=False, norm_layer=EPS6
    )
    prepare(model)
    generator = take("unilm/beit/masking_generator.py").MaskingGenerator
    draw = generator(4, 6, min_num_patches=6)
    large = generator(14, 75, min_num_patches=16)
    draws = {"codes": torch.randint(9, (2, BATCH * 16), generator=random_weights)}

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        random.seed(number)
        mask = torch.stack([torch.from_numpy(draw()) for _ in range(BATCH)]).flatten(1).bool()
        labels = draws["codes"][number][mask.flatten()]
        return {"loss": nn.CrossEntropyLoss()(model(views[0], mask), labels)}

    groups = {
        "student.backbone": trained(model.patch_embed, model.blocks, model.norm),
        "student.mask_token": [model.mask_token],
        "student.head": trained(model.lm_head),
    }
    random.seed(7)
    draws["masks"] = torch.stack([torch.from_numpy(large()).bool() for _ in range(20)])
    overrides = ["+model.backbone.qkv_bias=False", "model.mask_share=0.4"]
    return Case(groups, step, [16], draws=draws, meta={"overrides": overrides})


def maskfeat() -> Case:
    """MaskFeat: slowfast/models/operators.py and masked.py, datasets/transform.py.

    Histograms, their order and the masks are the authors'; the encoder is iBOT's, which replaces
    masked patches in the same way, and the loss is the mean squared error.
    """
    vits = take("ibot/models/vision_transformer.py")
    options = dict(return_all_tokens=True, masked_im_modeling=True)
    model = prepare(vits.VisionTransformer(**VIT, **options))
    head = prepare(nn.Linear(WIDTH, 3 * 9 * 4))
    hog = take("SlowFast/slowfast/models/operators.py", "HOGLayerC").HOGLayerC(9, 2)
    source = ast.parse((OFFICIAL / "SlowFast/slowfast/models/masked.py").read_text())
    functions = [n for n in ast.walk(source) if getattr(n, "name", "") == "_get_hog_label_2d"]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(functions[:1], []), "masked.py", "exec"), space)
    stub = SimpleNamespace(pretrain_depth=[0], feat_size=[[4]], hogs=[hog], pred_hog_wt=1.0)
    stub.hog_loss = "mse"
    generator = take("SlowFast/slowfast/datasets/transform.py", "MaskingGenerator").MaskingGenerator
    draw = generator(4, 6, min_num_patches=6)

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        random.seed(number)
        mask = torch.stack([torch.from_numpy(draw()) for _ in range(BATCH)]).bool()
        labels = space["_get_hog_label_2d"](stub, views[0], [mask.flatten(1)])[0][0]
        tokens = model(views[0], mask=mask)[:, 1:]
        return {"loss": F.mse_loss(head(tokens)[mask.flatten(1)], labels)}

    token = model.masked_embed
    groups = {
        "student.backbone": [p for p in trained(model) if p is not token],
        "student.mask_token": [token],
        "student.head": trained(head),
    }
    return Case(groups, step, [16])


def _tensorflow() -> Any:
    """Functions of TensorFlow that SimCLR's objective calls, by PyTorch's."""
    return SimpleNamespace(
        math=SimpleNamespace(l2_normalize=lambda x, axis: F.normalize(x, dim=axis)),
        split=lambda x, count, axis: x.chunk(count, axis),
        shape=lambda x: x.shape,
        range=torch.arange,
        one_hot=lambda x, depth: F.one_hot(x, depth).float(),
        matmul=lambda a, b, transpose_b: a @ b.mT,
        concat=torch.cat,
        reduce_mean=torch.mean,
        nn=SimpleNamespace(
            softmax_cross_entropy_with_logits=lambda labels, logits: (
                -(labels * logits.log_softmax(-1)).sum(-1)
            )
        ),
    )


def simclr() -> Case:
    """SimCLR: tf2/objective.py, TensorFlow's functions being PyTorch's.

    The head is that of tf2/model.py with two layers, built here of PyTorch's layers: a bias in the
    batch norm of the first and none in that of the last.
    """
    encoder = prepare(Pooled())
    last = nn.BatchNorm1d(OUTPUTS)
    last.register_parameter("bias", None)
    head = prepare(nn.Sequential(*two_layers(OUTPUTS), last))
    objective = take("simclr/tf2/objective.py", "add_contrastive_loss", tf=_tensorflow(),
                     LARGE_NUM=1e9)  # fmt: skip

    def step(views: list[Tensor], _: int) -> dict[str, Tensor]:
        hidden = head(encoder(torch.cat(views)))
        loss, _, _ = objective.add_contrastive_loss(hidden, True, 0.1)
        # The authors add the losses of both directions, which are averaged here.
        return {"loss": loss / 2}

    groups = {"student.backbone": trained(encoder), "student.head": trained(head)}
    return Case(groups, step, buffers=lambda: statistics(student__head=head))


def moco_v3() -> Case:
    """MoCo v3: moco/builder.py, around DINO's ViT."""

    class Encoder(Pooled):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(super().forward(images))

    model = take("moco-v3/moco/builder.py").MoCo_ViT(Encoder, OUTPUTS, HIDDEN, 0.2)
    prepare(model)
    model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())
    model.base_encoder.vit.patch_embed.requires_grad_(False)
    groups, start = both(
        model.base_encoder, model.momentum_encoder, {"backbone": "vit", "head": "head"}
    )
    groups["predictor"] = trained(model.predictor)

    heads = dict(student__head=model.base_encoder.head, teacher__head=model.momentum_encoder.head)
    buffers = partial(statistics, **heads, predictor=model.predictor)
    step = lambda views, _: {"loss": model(*views, MOMENTUM)}  # noqa: E731
    return Case(groups, step, start=start, buffers=buffers, batch=6, learning_rate=0.02)


def swav() -> Case:
    """SwAV: main_swav.py's training function and src/resnet50.py, around DINO's ViT."""
    main = take("swav/main_swav.py", "train", "distributed_sinkhorn", logger=mock.Mock(),
                AverageMeter=mock.Mock)  # fmt: skip
    arguments = argparse.Namespace(
        epsilon=0.05, sinkhorn_iterations=3, world_size=1, crops_for_assign=[0, 1],
        nmb_crops=[2, 2], temperature=0.1, use_fp16=False, freeze_prototypes_niters=0, rank=1,
        queue_length=0, epoch_queue_starts=1,
    )  # fmt: skip
    main.train.__globals__["args"] = arguments
    resnet = take("swav/src/resnet50.py", "ResNet").ResNet
    net = resnet.__new__(resnet)
    nn.Module.__init__(net)
    # As in the constructor, which cannot be so narrow.
    net.projection_head = two_layers(OUTPUTS, bias=True)
    net.prototypes, net.l2norm = nn.Linear(OUTPUTS, 7, bias=False), True
    net.encoder = Pooled()
    net.forward_backbone = net.encoder.forward
    prepare(net)
    weight = net.prototypes.weight
    weight.data.copy_(F.normalize(weight.data, dim=1))  # this project's start is normalised
    taken: dict[str, Tensor] = {}

    class Loss(Exception):
        """Stands for the backward pass: the driver of this script has its own."""

    def backward(loss: Tensor) -> None:
        taken["loss"] = loss
        raise Loss

    network = mock.Mock(side_effect=net, module=net)
    optimizer = mock.Mock(param_groups=[{}])

    def step(views: list[Tensor], _: int) -> dict[str, Tensor]:
        with mock.patch.object(Tensor, "backward", backward), suppress(Loss):
            main.train([views], network, optimizer, 0, [0.0], None)
        return {"loss": taken["loss"]}

    groups = {
        "student.backbone": trained(net.encoder),
        "student.head": trained(net.projection_head),
        "prototypes": [net.prototypes.weight],
    }
    return Case(groups, step, [16, 16, 8, 8],
                buffers=lambda: statistics(student__head=net.projection_head))  # fmt: skip


def vicreg() -> Case:
    """VICReg: main_vicreg.py, around DINO's ViT."""
    arguments = argparse.Namespace(
        mlp=f"{HIDDEN}-{HIDDEN}-{OUTPUTS}", arch="toy", batch_size=6, sim_coeff=25.0,
        std_coeff=25.0, cov_coeff=1.0,
    )  # fmt: skip
    resnet = SimpleNamespace(toy=lambda **_: (Pooled(), WIDTH))
    optimiser = SimpleNamespace(Optimizer=torch.optim.Optimizer)
    main = take("vicreg/main_vicreg.py", resnet=resnet, optim=optimiser)
    model = main.VICReg(arguments)
    for layer, after in pairwise(model.projector):
        if isinstance(after, nn.BatchNorm1d):  # it subtracts the bias before it
            layer.register_parameter("bias", None)
    prepare(model)

    groups = {"student.backbone": trained(model.backbone), "student.head": trained(model.projector)}
    buffers = partial(statistics, student__head=model.projector)
    step = lambda views, _: {"loss": model(*views)}  # noqa: E731
    return Case(groups, step, buffers=buffers, batch=6, learning_rate=1e-3)


def vicregl() -> Case:
    """VICRegL: main_vicregl.py and utils.py with the options of ConvNeXt, around DINO's ViT."""
    arguments = argparse.Namespace(
        mlp=f"{HIDDEN}-{HIDDEN}-{OUTPUTS}", maps_mlp="8-8-8", arch="convnext", alpha=0.75,
        num_matches=[3, 2], l2_all_matches=1, inv_coeff=25.0, var_coeff=25.0, cov_coeff=1.0,
        fast_vc_reg=0,
    )  # fmt: skip
    main = take("VICRegL/main_vicregl.py", utils=take("VICRegL/utils.py"))
    model = main.VICRegL.__new__(main.VICRegL)
    nn.Module.__init__(model)
    model.args, model.embedding_dim, utils = arguments, OUTPUTS, main.utils
    model.encoder = Pooled()
    model.projector = utils.MLP(arguments.mlp, WIDTH, "layer_norm")
    model.maps_projector = utils.MLP(arguments.maps_mlp, WIDTH, "layer_norm")
    prepare(model)
    boxes = torch.rand(2, 3, BATCH, 4, generator=random_weights) * 0.4 + 0.1
    boxes[:, 1, 0, 1] += boxes[:, 1, 0, 3]
    boxes[:, 1, 0, 3] *= -1  # mirrored

    def centres(box: Tensor, side: int) -> Tensor:
        shares = (torch.arange(side) + 0.5) / side
        top, left, height, width = box[:, :, None].unbind(1)
        x, y = (left + shares * width)[:, None, :], (top + shares * height)[:, :, None]
        return torch.stack(torch.broadcast_tensors(x, y), dim=-1)

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        tokens = [model.encoder.tokens(view) for view in views]
        outputs = [model.projector(view.mean(dim=1)) for view in tokens]
        maps = [model.maps_projector(view.flatten(0, 1)).view(*view.shape) for view in tokens]
        grids = [centres(box, math.isqrt(view.shape[1])) for box, view in
                 zip(boxes[number], tokens, strict=True)]  # fmt: skip
        whole, local = sum(model.global_loss(outputs)), sum(model.local_loss(maps, grids))
        loss = arguments.alpha * whole + (1 - arguments.alpha) * local
        return {"loss": loss, "loss_global": whole, "loss_local": local}

    groups = {
        "student.backbone": trained(model.encoder),
        "student.head": trained(model.projector),
        "student.local_head": trained(model.maps_projector),
    }
    return Case(groups, step, [16, 16, 8], draws={"boxes": boxes}, learning_rate=1e-3)


def densecl() -> Case:
    """DenseCL: openselfsup/models/densecl.py, necks.py, heads/contrastive_head.py."""

    class Backbone(Pooled):
        def init_weights(self, **_: Any) -> None:
            pass

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.tokens(images).mT.unflatten(2, (4, 4))]

    registry = SimpleNamespace(register_module=lambda cls: cls)
    unused = ("constant_init", "kaiming_init", "normal_init")
    neck = take(
        "DenseCL/openselfsup/models/necks.py", "DenseCLNeck", "_init_weights", NECKS=registry,
        _BatchNorm=nn.BatchNorm2d, _InstanceNorm=nn.InstanceNorm2d,
        **dict.fromkeys(unused, mock.Mock()),
    )  # fmt: skip
    head = take("DenseCL/openselfsup/models/heads/contrastive_head.py", HEADS=registry)
    builder = SimpleNamespace(
        build_backbone=lambda _: Backbone(),
        build_neck=lambda _: neck.DenseCLNeck(WIDTH, HIDDEN, OUTPUTS),
        build_head=lambda _: head.ContrastiveHead(0.2),
    )
    main = take("DenseCL/openselfsup/models/densecl.py", MODELS=registry, builder=builder)
    model = main.DenseCL(None, queue_len=6, feat_dim=OUTPUTS, momentum=MOMENTUM, loss_lambda=0.3)
    prepare(model.encoder_q)
    prepare(model.encoder_k)
    model.encoder_k.load_state_dict(model.encoder_q.state_dict())
    model.encoder_k.requires_grad_(False)

    def step(views: list[Tensor], _: int) -> dict[str, Tensor]:
        losses = model.forward_train(torch.stack(views, dim=1))
        whole, dense = losses["loss_contra_single"], losses["loss_contra_dense"]
        return {"loss": whole + dense, "loss_global": whole / 0.7, "loss_dense": dense / 0.3}

    names = {"backbone": "0.vit", "head": "1.mlp", "dense_head": "1.mlp2"}
    groups, start = both(model.encoder_q, model.encoder_k, names)
    buffers = lambda: {"queue.keys": model.queue.T, "dense_queue.keys": model.queue2.T}  # noqa: E731
    start |= {name: [tensor] for name, tensor in buffers().items()}
    meta = {"overrides": ["model.dense_weight=0.3"]}
    return Case(groups, step, start=start, buffers=buffers, meta=meta)


def _jax() -> Any:
    """Functions of JAX's numpy that DetCon's loss calls, by PyTorch's."""
    return SimpleNamespace(
        array=torch.Tensor,
        equal=torch.eq,
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        arange=torch.arange,
        einsum=torch.einsum,
        concatenate=lambda parts, axis: torch.cat(parts, axis),
        reshape=lambda x, shape: x.reshape(shape),
        sum=lambda x, axis, keepdims=False: x.sum(dim=axis, keepdim=keepdims),
        maximum=lambda x, least: x.clamp(min=least),
        greater=torch.gt,
        mean=torch.mean,
    )


def detcon() -> Case:
    """DetCon-B: utils/losses.py, JAX's functions being PyTorch's, around DINO's ViT.

    Heads are those of utils/networks.py, built here of PyTorch's layers. The segments of a step are
    drawn here.
    """
    functional = SimpleNamespace(log_softmax=lambda x, axis=-1: x.log_softmax(axis))
    jax = SimpleNamespace(nn=functional, device_count=lambda: 1)
    haiku = SimpleNamespace(one_hot=lambda x, depth: F.one_hot(x, depth).float())
    helpers = SimpleNamespace(l2_normalize=lambda x, axis: F.normalize(x, dim=axis))
    main = take("detcon/utils/losses.py", jnp=_jax(), jax=jax, hk=haiku, helpers=helpers)

    student, teacher = (
        prepare(nn.ModuleDict({"backbone": Pooled(), "head": two_layers(WIDTH)})) for _ in range(2)
    )
    predictor = prepare(two_layers(WIDTH))
    labels = torch.randint(4, (2, 2, BATCH, 16), generator=random_weights)
    at = torch.randint(16, (2, 2, BATCH, 3), generator=random_weights)
    drawn = labels.gather(-1, at)

    def outputs(network: nn.ModuleDict, view: Tensor, number: int, which: int) -> Tensor:
        tokens = network["backbone"].tokens(view)
        inside = drawn[number][which][:, :, None] == labels[number][which][:, None, :]
        weights = inside / inside.sum(dim=-1, keepdim=True)
        return network["head"]((weights @ tokens).flatten(0, 1))

    def step(views: list[Tensor], number: int) -> dict[str, Tensor]:
        shape, numbered = (BATCH, 3, -1), [(view, number, i) for i, view in enumerate(views)]
        online = [predictor(outputs(student, *each)).view(shape) for each in numbered]
        with torch.no_grad():
            target = [outputs(teacher, *each).view(shape) for each in numbered]
        with mock.patch.object(Tensor, "astype", lambda x, _: x.float(), create=True):
            loss = main.byol_nce_detcon(*online, *target, *drawn[number], *drawn[number])
        return {"loss": loss}

    groups, start = both(student, teacher, {"backbone": "backbone", "head": "head"})
    groups["predictor"] = trained(predictor)
    heads = dict(student__head=student["head"], teacher__head=teacher["head"])
    return Case(
        groups, step, after=lambda: follow(teacher.parameters(), student.parameters()), start=start,
        buffers=partial(statistics, **heads, predictor=predictor),
        draws={"labels": labels, "drawn": drawn}, meta={"overrides": ["model.output_dim=8"]},
    )  # fmt: skip


def selfpatch() -> Case:
    """SelfPatch: main_selfpatch.py, selfpatch_vision_transformer.py.

    Grids have the authors' sizes, 14 x 14 and 6 x 6 tokens, which their head knows alone.
    """
    vits = take("SelfPatch/selfpatch_vision_transformer.py")
    head = partial(vits.DINOHead, WIDTH, OUTPUTS, hidden_dim=HIDDEN, bottleneck_dim=HIDDEN)
    sizes = {**VIT, "img_size": [28], "patch_size": 2}
    main = take("SelfPatch/main_selfpatch.py", "MultiCropWrapper", "DINOLoss")

    def network() -> nn.Module:
        backbone = vits.VisionTransformer(**sizes, norm_layer=EPS6)
        aggregation = vits.SelfPatchHead(WIDTH, 2, 4)
        return prepare(main.MultiCropWrapper(backbone, aggregation, head(), head()), 14)

    student, teacher = network(), network()
    loss = main.DINOLoss(OUTPUTS, OUTPUTS, 3, TEMPERATURE, TEMPERATURE, 0, 1)

    def step(views: list[Tensor], _: int) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = [teacher(torch.cat(views[:2])), teacher(views[2])]
        outputs = [student(torch.cat(views[:2]), loc=False), student(views[2], loc=False)]
        total, whole, patch = loss(None, None, outputs, targets, 0, 0)
        return {"loss": total, "loss_global": whole, "loss_patch": patch}

    named = []
    for name, net in (("student", student), ("teacher", teacher)):
        modules = {"head": net.c_head, "patch_head": net.p_head, "blocks": net.ca_head.cls_blocks}
        named.append({f"{name}.{ours}": trained(module) for ours, module in modules.items()})
        # The aggregation's norm is this project's final norm of the encoder.
        named[-1][f"{name}.backbone"] = trained(net.backbone, net.ca_head.norm)
        named[-1][f"{name}.token"] = [net.ca_head.cls_token]
    sizes = ["patch_size=2", "img_size=28"]
    overrides = [*(f"model.backbone.{size}" for size in sizes), "views.local_size=12"]
    return Case(
        named[0], step, [28, 28, 12], lambda: follow(teacher.parameters(), student.parameters()),
        start=named[1], batch=2, learning_rate=0.02,
        buffers=lambda: {"loss.center": loss.center, "patch_loss.center": loss.patch_center},
        meta={"overrides": [*overrides, "views.global_size=28", "model.aggregation_depth=2"]},
    )  # fmt: skip


def run(method: str) -> dict[str, np.ndarray]:
    """Run two steps; return everything that the test compares."""
    random_weights.manual_seed(list(SOURCES).index(method))
    torch.manual_seed(0)
    case: Case = globals()[method]()
    arrays: dict[str, Any] = {}

    def record(prefix: str, groups: dict[str, Iterable[Tensor]], gradient: bool = False) -> None:
        for name, tensors in groups.items():
            for i, tensor in enumerate(tensors):
                value = tensor.grad if gradient else tensor
                if value is not None:
                    order = case.rows.get(name)
                    value = value if order is None or len(value) != len(order) else value[order]
                    arrays[f"{prefix}.{name}.{i}"] = value.detach().clone()

    record("start", case.groups)
    record("start", case.start)
    arrays |= {f"draw.{name}": value for name, value in case.draws.items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for number in range(2):
        views = []
        for i, side in enumerate(case.sizes):
            shape = (case.batch, 3, side, side)
            pixels = 32 * torch.randint(8, shape, generator=random_weights).to(torch.uint8)
            arrays[f"step{number}.view{i}"] = pixels
            views.append((pixels.float() - mean) / std)
        losses = case.step(views, number)
        losses["loss"].backward()
        arrays |= {f"step{number}.{k}": torch.as_tensor(v).detach() for k, v in losses.items()}
        record(f"step{number}.grad", case.groups, gradient=True)
        with torch.no_grad():
            for tensor in {id(t): t for g in case.groups.values() for t in g}.values():
                if tensor.grad is not None:
                    tensor -= case.learning_rate * tensor.grad
                    tensor.grad = None
        case.after()
        arrays |= {f"step{number}.buffer.{k}": v.clone() for k, v in case.buffers().items()}
    _, repository, revision = SOURCES[method]
    meta = dict(source=f"github.com/{repository}", revision=revision, sizes=case.sizes)
    meta |= dict(learning_rate=case.learning_rate, momentum=MOMENTUM, temperature=TEMPERATURE)
    meta |= {"overrides": [], "values": {}, **case.meta}
    return {k: v.numpy() for k, v in arrays.items()} | {"__meta__": np.array(repr(meta))}


def main() -> None:
    """Write the files."""
    global OFFICIAL
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", type=Path, required=True, help="folder of checkouts")
    parser.add_argument("--output", type=Path, default=HERE / "methods", help="folder of the files")
    parser.add_argument("methods", nargs="*", default=list(SOURCES), help="methods; default all")
    arguments = parser.parse_args()
    OFFICIAL = arguments.official
    torch.set_num_threads(1)
    np.int, np.float = int, float  # type: ignore[attr-defined]  # removed from NumPy since
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    same = lambda tensor, *_, **__: tensor  # noqa: E731
    with mock.patch.object(Tensor, "cuda", same), mock.patch.object(nn.Module, "cuda", same):
        for method in arguments.methods:
            path = arguments.output / f"{method}.npz"
            np.savez_compressed(path, **run(method))
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
