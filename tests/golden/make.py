#!/usr/bin/env python3
"""Make the golden files: one training step of the published FLSL code, run on a CPU.

Usage: ``python tests/golden/make.py --published-code DIR``, where DIR is a checkout of
https://github.com/QingSuML/FLSL. Its modules are imported from there at run time. The files of this
folder were made with commit acb5d6f (2024-02-12). README.md describes their content.
"""

from __future__ import annotations

import argparse
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
PRIOR_SHARPNESS, PRIOR_SCALE, MIXTURE = 1e3, 0.2, 0.3
# Sizes, with names as in README.md. The first has windows that leave tokens over and positions
# that are resampled for local views; the second another patch, odd heads and other scales.
STEPS: dict[str, dict[str, Any]] = {
    "step_patch8": dict(
        img=48, loc=24, p=8, d=24, depth=2, h=3, K=32, hid=32, bot=16, B=2, wg=4, wl=2,
        sa=0.1 / 24**0.5, ca=0.2 / 24**0.5, student_temp=0.1, teacher_temp=0.04,
        coefficients=[0.03, 1.0, 5.0], seed=1,
    ),
    "step_patch12": dict(
        img=48, loc=36, p=12, d=16, depth=1, h=4, K=48, hid=24, bot=24, B=3, wg=2, wl=3,
        sa=0.5 / 16**0.5, ca=1.5 / 16**0.5, student_temp=0.2, teacher_temp=0.07,
        coefficients=[0.3, 0.7, 2.0], seed=2,
    ),
}  # fmt: skip


def on_the_cpu() -> Any:
    """Patch PyTorch: the published step moves its tensors to a GPU."""
    return mock.patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor)


def windows(sides: list[int], meta: dict[str, Any], sizes: tuple[int, ...]) -> list[Tensor]:
    """Draw the queries of all views but the first, as the published augmentation does."""
    import main_flsl

    sampler = main_flsl.DataAugmentationFLSL(random_sampling=True)._sampling_mask
    pairs = zip(sides[1:], sizes, strict=True)
    drawn = [[sampler(side // meta["p"], n) for _ in range(meta["B"])] for side, n in pairs]
    return [torch.empty(0), *map(torch.stack, drawn)]


def build_network(meta: dict[str, Any], generator: torch.Generator) -> nn.Module:
    """Build an encoder with a head from the published classes and give it random weights.

    No weight is zero and no norm is the identity, so that each changes the result. Weights are
    multiples of 1/128, so that the files are small.
    """
    import utils
    import vision_transformer as vits

    vit = vits.VisionTransformer(
        img_size=[meta["img"]], patch_size=meta["p"], embed_dim=meta["d"], depth=meta["depth"],
        num_heads=meta["h"], qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    positions = utils.get_2d_sincos_pos_embed(meta["d"], meta["img"] // meta["p"])
    head = vits.FLSLhead(meta["d"], meta["K"], hidden_dim=meta["hid"], bottleneck_dim=meta["bot"])
    network = utils.ModelWrapper(vit, head)
    for name, parameter in network.named_parameters():
        if name.endswith("weight_g"):  # the published code keeps this scale at 1
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        wide = parameter.dim() > 1
        values = noise / parameter[0].numel() ** 0.5 if wide else 0.2 * noise + shift
        parameter.data.copy_((128 * values).round() / 128)
    vits.make_vit_noclass(vit, positions, hook={"norm": "norm"}, post_layernorm=True)
    return network


def run_step(meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run one training step of the published code; return everything that tests compare."""
    import main_flsl
    import utils

    generator = torch.Generator().manual_seed(meta["seed"])
    random.seed(meta["seed"])
    torch.manual_seed(meta["seed"])
    student, teacher = build_network(meta, generator), build_network(meta, generator)
    teacher.requires_grad_(False)
    batch, sides = meta["B"], [meta["img"], meta["img"], meta["loc"], meta["loc"]]
    views = [torch.randn(batch, 3, side, side, generator=generator) for side in sides]
    views = [(16 * view).round() / 16 for view in views]
    masks = windows(sides, meta, (meta["wg"], meta["wl"], meta["wl"]))

    loss = main_flsl.FLSLLoss(
        meta["student_temp"], [meta["teacher_temp"]], utils.NonEmptyPriorKL(meta["K"]),
        coefficients=meta["coefficients"],
    )  # fmt: skip
    with on_the_cpu():
        total, (intra, inter, volume) = main_flsl.train_one_batch(
            0, 0, student, teacher, loss, views, masks, [2, 4],
            sa_temp_schedule=[meta["sa"]], ca_temp_schedule=[meta["ca"]], autocast=False,
        )  # fmt: skip
    total.backward()

    out: dict[str, Tensor] = {f"view{i}": view for i, view in enumerate(views)}
    out |= {f"mask{i}": masks[i] for i in range(1, 4)}
    for name, network in (("student", student), ("teacher", teacher)):
        out |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    parameters = student.named_parameters()
    out |= {f"grad.{key}": p.grad for key, p in parameters if p.grad is not None}
    out |= {"loss.intra_view": intra, "loss.inter_view": inter, "loss.volume": volume}
    out["loss.total"] = total
    out["teacher_tokens"] = teacher.forward_backbone(views[0])
    for group, members in enumerate(([1], [2, 3])):
        tokens = student.forward_backbone(torch.cat([views[i] for i in members]))
        mask = torch.cat([masks[i] for i in members])
        keys = out["teacher_tokens"].repeat(len(members), 1, 1)
        scale = PRIOR_SCALE / meta["d"] ** 0.5
        prior = utils.attention_map(tokens, keys, mask, scale, PRIOR_SHARPNESS)
        values = {"enc_s": tokens, "prior_attention": prior}
        values["mode_s"] = utils.flsl_meanshift(tokens, tokens, mask, temp=meta["sa"])[1]
        values["mode_t"] = utils.flsl_meanshift(tokens, keys, mask, temp=meta["ca"])[1]
        values[f"mode_t_mixture{MIXTURE}"] = utils.flsl_meanshift(
            tokens, keys, mask, prior, meta["ca"], MIXTURE
        )[1]
        out |= {f"group{group}.{key}": value for key, value in values.items()}
    arrays = {key: value.detach().numpy() for key, value in out.items()}
    return {**arrays, "__meta__": np.array(repr(meta))}


def run_three_steps() -> dict[str, np.ndarray]:
    """Run three steps with the published schedules, clipping, AdamW and moving average.

    The lines around the published functions are those of ``main_flsl.train_one_epoch``.
    """
    import main_flsl
    import utils

    meta = dict(STEPS["step_patch12"], d=8, h=2, hid=8, bot=8, K=12, B=2, seed=3, clip=0.05)
    epochs, steps = 4, 5  # steps of an epoch
    ends = {"weight_decay": (0.04, 0.4), "momentum": (0.9, 1.0), "intra": (0.3, 0.03)}
    ends |= {"self": (0.1 / 8**0.5, 0.2 / 8**0.5), "cross": (0.5 / 8**0.5, 0.7 / 8**0.5)}
    schedules = {"lr": utils.cosine_scheduler(0.01, 1e-6, epochs, steps, warmup_epochs=1)}
    for name, values in ends.items():
        schedules[name] = utils.cosine_scheduler(*values, epochs, steps)
    generator = torch.Generator().manual_seed(meta["seed"])
    random.seed(meta["seed"])
    student, teacher = build_network(meta, generator), build_network(meta, generator)
    teacher.requires_grad_(False)
    out: dict[str, Any] = {f"schedule.{name}": values for name, values in schedules.items()}
    for name, network in (("student", student), ("teacher", teacher)):
        out |= {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}
    loss = main_flsl.FLSLLoss(
        meta["student_temp"], [meta["teacher_temp"]] * epochs, utils.NonEmptyPriorKL(meta["K"]),
        coefficients=list(meta["coefficients"]),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    sides = [meta["img"], meta["img"], meta["loc"], meta["loc"]]
    for number, at in enumerate((5, 6, 7)):
        optimizer.param_groups[0]["weight_decay"] = schedules["weight_decay"][at]
        for group in optimizer.param_groups:
            group["lr"] = schedules["lr"][at]
        loss.coefficients[0] = schedules["intra"][at]
        views = [torch.randn(meta["B"], 3, side, side, generator=generator) for side in sides]
        views = [view.round() for view in views]
        masks = windows(sides, meta, (2, 3, 3))
        with on_the_cpu():
            total, _ = main_flsl.train_one_batch(
                at, 1, student, teacher, loss, views, masks, [2, 4],
                sa_temp_schedule=schedules["self"], ca_temp_schedule=schedules["cross"],
                autocast=False,
            )  # fmt: skip
        optimizer.zero_grad()
        total.backward()
        utils.clip_gradients(student, meta["clip"])
        optimizer.step()
        momentum = schedules["momentum"][at]
        with torch.no_grad():
            for new, kept in zip(student.parameters(), teacher.parameters(), strict=True):
                kept.mul_(momentum).add_((1 - momentum) * new)
        out |= {f"step{number}.view{i}": view.half() for i, view in enumerate(views)}
        out |= {f"step{number}.mask{i}": masks[i] for i in range(1, 4)}
        out[f"step{number}.loss"] = total
    for name, network in (("student", student), ("teacher", teacher)):
        out |= {f"end.{name}.{key}": value for key, value in network.state_dict().items()}
    arrays = {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in out.items()}
    return {**arrays, "__meta__": np.array(repr(meta))}


def main() -> None:
    """Write the files beside this script, and that of three steps in ``methods/``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--published-code", type=Path, required=True, help="checkout of FLSL")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the files")
    arguments = parser.parse_args()
    if not (arguments.published_code / "main_flsl.py").is_file():
        parser.error(f"{arguments.published_code} has no main_flsl.py: name a checkout of FLSL")
    sys.path.insert(0, str(arguments.published_code))
    torch.set_num_threads(1)
    for name, meta in STEPS.items():
        path = arguments.output / f"{name}.npz"
        np.savez_compressed(path, **run_step(meta))
        print(f"{path}: {path.stat().st_size:,} bytes")
    (arguments.output / "methods").mkdir(exist_ok=True)
    np.savez_compressed(arguments.output / "methods/flsl.npz", **run_three_steps())


if __name__ == "__main__":
    main()
