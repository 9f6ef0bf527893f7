"""The benchmarks of ``tools/benchmark.py``; each takes the parsed command line."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.modeling.backbone import vit as detectron2_vit
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.launch import launch, wrap_ddp
from flsl_d2.errors import InputError
from flsl_d2.images.listing import find_images
from flsl_d2.images.reader import read_rgb
from flsl_d2.images.store import ImageStore, open_images
from flsl_d2.modeling import VIT_SIZES, FLSLViT, SimpleFeaturePyramid
from flsl_d2.modeling.vit import evenly_spread_blocks
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.step_numbers import StepNumbers
from pretrain.studies.benchmark.measuring import (
    Timing,
    prepared_device,
    reference_function,
    report,
    seconds_of,
    stored_for_backward,
    time_in_turn,
)
from pretrain.studies.benchmark.step import Step, build_trainer, run_step
from pretrain.trainer import PRECISIONS, resolve_precision
from pretrain.views import DEVICE_WORK

Runner = Callable[[], Any]

# Dense bf16 and fp16 peak of GPUs, from the vendor's data sheets, by a part of PyTorch's name.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
    "V100": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
# Blocks are compiled where a variant says so, and not by default on GPUs.
NOT_COMPILED = "train.compile=False"
# Overrides that change the speed of a step and not its result; in "a+b" the later one wins.
VARIANTS: dict[str, tuple[str, ...]] = {
    "eager": ("model.pack_views=False", NOT_COMPILED),
    "packed": ("model.pack_views=True",),
    "compiled": ("train.compile=True",),
    # CUDA graphs of the teacher's blocks; without stochastic depth of the student's as well.
    "graphs": ("train.compile=True", "train.compile_mode=reduce-overhead"),
    "checkpointed": ("model.backbone.use_act_checkpoint=True",),
    "augmented on device": ("views.on_device=augmentation",),
    "cropped on device": ("views.on_device=crops",),
}
_WORK = {
    "nothing": "all views on the CPU",
    "augmentation": "crops on the CPU, augmentation on the device",
    "crops": "teacher's crop on the CPU, the rest on the device",
}
OWN, WITHOUT_FILES = "flsl_d2", "flsl_d2, a batch in memory"
GROWTH = {
    "views.global_size": (112, 160, 224, 288),
    "views.num_local": (0, 2, 4, 8),
    "model.head.num_centroids": (1024, 4096, 16384, 65536),
}
SIZES = {"s": VIT_SIZES["small"], "b": VIT_SIZES["base"], "l": VIT_SIZES["large"]}


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a GPU in TFLOP/s; None where it is not listed."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def overrides_of(variant: str) -> list[str]:
    """Return the overrides of a variant such as ``packed+compiled``.

    Raises:
        InputError: an unknown part.
    """
    unknown = [part for part in variant.split("+") if part not in VARIANTS]
    if unknown:
        raise InputError(
            f"--variants has {', '.join(unknown)}; known are {', '.join(VARIANTS)}, and several "
            "joined by +."
        )
    return [override for part in variant.split("+") for override in VARIANTS[part]]


def benchmark_data(args: argparse.Namespace) -> None:
    """Measure each division of work between worker and device, and decoding alone, on one core."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = load_lazy_config(args.config_file, args.opts)
    files = find_images(args.images)[: args.num_images]
    epochs = itertools.count()

    def over_files(make: Callable[[int, str], object]) -> Callable[[], Runner]:
        return lambda: lambda: [make(index, file) for index, file in enumerate(files)]

    def views_of(dataset: PretrainDataset) -> Callable[[int, str], object]:
        # The epoch is part of the seed, so every repetition draws anew.
        return lambda index, _: dataset[next(epochs), index]

    steps = {}
    if args.reference_module:
        make_views = reference_function(args.reference_module, "make_views")
        steps["reference"] = over_files(lambda _, file: make_views(file))
    for work, reduced in itertools.product(DEVICE_WORK, (False, True)):
        cfg.views.update(on_device=work, reduced_decoding=reduced)
        dataset = PretrainDataset(files, instantiate(cfg.views))
        steps[_WORK[work] + "; reduced decoding" * reduced] = over_files(views_of(dataset))
    steps["decoding alone"] = over_files(lambda _, file: read_rgb(file))
    device = torch.device("cpu")
    timings = time_in_turn(steps, args.repeats, args.warmup, device)
    first = next(iter(timings))
    rows = [
        {
            "data path": name,
            "images/s per core": timing.rate(len(files)),
            f"ratio to {first}": timing.speed_against(timings[first]),
            "spread": float(np.ptp(timing.seconds) / timing.median),
        }
        for name, timing in timings.items()
    ]
    title = f"{len(files)} files of {args.images}, {args.repeats} repetitions in turn, one thread"
    seconds = {name: timing.seconds for name, timing in timings.items()}
    report(title, rows, device, args.json, num_images=len(files), seconds=seconds)


def benchmark_step(args: argparse.Namespace) -> None:
    """Measure speed, memory and share of the peak of each variant, and of a reference."""
    overrides = {name: [NOT_COMPILED, *args.opts, *overrides_of(name)] for name in args.variants}
    device = prepared_device(args)
    common = (args.batch_size, device, args.precision)
    makers: dict[str, Callable[[], Runner]] = {}
    if args.reference_module:
        make_step = reference_function(args.reference_module, "make_step")
        makers["reference"] = partial(make_step, *common)
    makers |= {name: partial(Step, args.config_file, o, *common) for name, o in overrides.items()}
    # None of the variants changes what has to be computed; recomputed blocks do not count.
    plain = [*args.opts, *VARIANTS["eager"], "model.backbone.use_act_checkpoint=False"]
    flops = Step(args.config_file, plain, 2, device, args.precision).flops_per_image()
    timings = time_in_turn(makers, args.repeats, args.warmup, device)
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    first = next(iter(timings))
    rows = []
    for name, timing in timings.items():
        step, rate, kept = timing.function, timing.rate(args.batch_size), None
        own = flops if isinstance(step, Step) else None
        if isinstance(step, Step) and "train.compile=True" not in overrides[name]:
            kept = step.stored_bytes() / args.batch_size / 2**20
        rows.append(
            {
                "step": name,
                "images/s": rate,
                f"ratio to {first}": timing.speed_against(timings[first]),
                "s/step": timing.median,
                "peak GiB": timing.peak_gib,
                "MiB/image kept for backward": kept,
                "GFLOP/image": own / 1e9 if own else None,
                "MFU": rate * own / peak / 1e12 if rate and own and peak else None,
            }
        )
    title = (
        f"batch {args.batch_size}, {args.precision} on {device}, {torch.get_num_threads()} "
        f"thread(s), median of {args.repeats} steps in turn"
    )
    seconds = {name: timing.seconds for name, timing in timings.items()}
    report(title, rows, device, args.json, batch_size=args.batch_size, seconds=seconds)


class _Run:
    """Steps of a real run; without ``read``, steps on its first batch alone.

    Attributes:
        waits: seconds that each step waited for its batch.
    """

    def __init__(
        self, args: argparse.Namespace, files: ImageStore, device: torch.device, read: bool = True
    ) -> None:
        cfg = load_lazy_config(args.config_file, args.opts)
        dataset = PretrainDataset(files, instantiate(cfg.views))
        batches = iter(build_pretrain_loader(dataset, args.batch_size, args.workers))
        self.batches = batches if read else itertools.repeat(next(batches))
        self.waits: list[float] = []
        self.trainer = build_trainer(cfg, args.batch_size, device, args.precision, self._timed())

    def _timed(self) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(self.batches)
            self.waits.append(time.perf_counter() - start)
            yield batch

    def __call__(self) -> None:
        run_step(self.trainer)


def benchmark_end_to_end(args: argparse.Namespace) -> None:
    """Measure training from files, and the share of the time in which the step waited for them.

    Each side runs alone for a round, from the start of its workers to their end. Were the sides to
    take turns at each step, the workers of one would fetch ahead during the step of the other.
    """
    device = prepared_device(args)
    files = open_images(args.images)  # shards as well
    sides: dict[str, Callable[[], Runner]] = {}
    if args.reference_module:
        make_run = reference_function(args.reference_module, "make_run")
        common = (args.batch_size, args.workers, device, args.precision)
        sides["reference"] = lambda: make_run(files, *common)
    sides[OWN] = lambda: _Run(args, files, device)
    sides[WITHOUT_FILES] = lambda: _Run(args, files, device, read=False)
    timings = {name: Timing(make) for name, make in sides.items()}
    waited = 0.0
    rounds = [name for _ in range(args.rounds) for name in sides]
    for name in tqdm(rounds, desc="end-to-end", unit="side", disable=None):
        step = sides[name]()
        seconds_of(step, args.warmup)
        timings[name].seconds.append(seconds_of(step, args.repeats))
        if isinstance(step, _Run) and name == OWN:
            waited += sum(step.waits[-args.repeats :])
        del step
        gc.collect()  # ends its workers as well
    first = next(iter(sides))
    rows = [
        {
            "run": name,
            "images/s": timing.rate(args.batch_size * args.repeats),
            f"ratio to {first}": timing.speed_against(timings[first]),
            "data wait": waited / sum(timing.seconds) if name == OWN else None,
        }
        for name, timing in timings.items()
    ]
    title = (
        f"{len(files)} files of {args.images}, batch {args.batch_size}, {args.workers} worker(s), "
        f"{args.precision} on {device}, median of {args.rounds} rounds of {args.repeats} steps"
    )
    report(title, rows, device, args.json, batch_size=args.batch_size, workers=args.workers)


def benchmark_processes(args: argparse.Namespace) -> None:
    """Measure steps in the processes that torchrun has started, or in this one alone.

    The exchange of gradients is what a step takes longer than the same step without it, so the part
    that is hidden behind the backward pass does not count.
    """
    launch(_measure_processes, 1, args=(args,), device=args.device)


def _measure_processes(args: argparse.Namespace) -> None:
    device = prepared_device(args)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    step = Step(args.config_file, args.opts, args.batch_size, device, args.precision)
    trainer, world_size = step.trainer, comm.get_world_size()
    plain: nn.Module = trainer.model
    wrapped = wrap_ddp(plain, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(model: nn.Module) -> None:
        trainer.model = model
        step()

    def exchange_numbers() -> None:
        scalars = {str(i): torch.zeros((), device=device) for i in range(10)}
        counts = {"data_time": 0.0, "failed": 0.0, "stop": 0.0}
        StepNumbers(0, trainer.schedules(0), scalars, counts).read()

    def median(function: Runner) -> float:
        """Median duration; all processes run the function equally often."""
        seconds_of(function, args.warmup)
        comm.synchronize()
        return statistics.median(seconds_of(function) for _ in range(args.repeats))

    whole, alone = median(lambda: run(wrapped)), median(lambda: run(plain))
    numbers = median(exchange_numbers)
    row = {
        "processes": world_size,
        "images/s": args.batch_size * world_size / whole,
        "s/step": whole,
        "share of gradients": max(1 - alone / whole, 0.0),
        "share of numbers": numbers / whole,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if comm.is_main_process():
        title = f"{args.batch_size} images a process, {args.precision} on {device.type}"
        report(title, [row], device, args.json, batch_size=args.batch_size)


def benchmark_scaling(args: argparse.Namespace) -> None:
    """Measure the growth of time and memory over one axis at a time."""
    device = prepared_device(args)
    plan = [("batch", batch) for batch in args.batches]
    plan += [(key, value) for key, values in GROWTH.items() for value in values]
    rows = []
    for key, value in tqdm(plan, desc="scaling", disable=None):
        batch = value if key == "batch" else args.batch_size
        overrides = [NOT_COMPILED, *args.opts, *([] if key == "batch" else [f"{key}={value}"])]
        make = partial(Step, args.config_file, overrides, batch, device, args.precision)
        timing = time_in_turn({"step": make}, args.repeats, args.warmup, device)["step"]
        step = timing.function if isinstance(timing.function, Step) else None
        rows.append(
            {
                "what": key,
                "value": value,
                "s/step": timing.median,
                "images/s": timing.rate(batch),
                "peak GiB": timing.peak_gib,
                "MiB kept for backward": step.stored_bytes() / 2**20 if step else None,
                "GFLOP/image": step.flops_per_image() / 1e9 if step else None,
            }
        )
        del step, timing
    report(f"growth on {device}", rows, device, args.json)


def pyramids(size: str, image_side: int, use_rel_pos: bool) -> dict[str, nn.Module]:
    """Build ViTDet's backbone by Detectron2 and by this project, with the same weights.

    Both have patches of 16 pixels, windows of 14 tokens and four global blocks. ``use_rel_pos``
    gives attention decomposed relative positions; ``image_side`` is in pixels.
    """
    depth = SIZES[size]["depth"]
    global_blocks = evenly_spread_blocks(depth)
    common: dict[str, Any] = {"img_size": image_side, "window_size": 14, "use_rel_pos": use_rel_pos}
    common |= SIZES[size]
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
    own.load_state_dict({k: v for k, v in reference.state_dict().items() if k in own.state_dict()})
    arguments: dict[str, Any] = {
        "in_feature": "last_feat",
        "out_channels": 256,
        "scale_factors": (4.0, 2.0, 1.0, 0.5),
        "top_block": LastLevelMaxPool(),
        "norm": "LN",
        "square_pad": image_side,
    }
    return {
        "detectron2": detectron2_vit.SimpleFeaturePyramid(net=reference, **arguments),
        "flsl_d2": SimpleFeaturePyramid(net=own, **arguments),
    }


def _noise_with_objects(batch: int, side: int, device: torch.device) -> list[dict[str, Any]]:
    """Make images of noise with ten boxes and masks each, as Detectron2's models take them."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(batch):
        corner = torch.rand(10, 2, generator=generator) * side * 0.6
        extent = (torch.rand(10, 2, generator=generator) * 0.3 + 0.1) * side
        boxes = torch.cat([corner, corner + extent], dim=1)
        masks = torch.zeros(10, side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((side, side), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.randint(0, 80, (10,), generator=generator)
        pixels = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
        inputs.append({"image": pixels, "instances": instances.to(device)})
    return inputs


class _Training:
    """Forward and backward pass of a detector."""

    def __init__(self, model: nn.Module, inputs: Any, mixed: torch.autocast) -> None:
        self.model, self.inputs, self.mixed = model.train(), inputs, mixed

    def loss(self) -> Tensor:
        with self.mixed, EventStorage():  # the detector's heads write to the storage
            return torch.stack([*self.model(self.inputs).values()]).sum()

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()


def benchmark_detection(args: argparse.Namespace) -> None:
    """Measure training steps and inference of this project and of Detectron2 in turn."""
    device = prepared_device(args)
    precision = resolve_precision(args.precision, device.type)
    dtype = PRECISIONS[precision]
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    inputs = _noise_with_objects(args.batch_size, args.size, device)

    def build(name: str) -> Runner:
        torch.manual_seed(0)  # both get the same detector
        backbone = pyramids(args.model, args.size, args.rel_pos)[name.partition(",")[0]]
        cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py", [])
        cfg.model.backbone = None
        model = instantiate(cfg.model)
        model.backbone = backbone
        model.to(device)
        if name.endswith("inference"):
            return torch.no_grad()(mixed(partial(model.eval(), inputs)))
        return _Training(model, inputs, mixed)

    sides = itertools.product(("detectron2", "flsl_d2"), ("training", "inference"))
    makers = {f"{side}, {what}": partial(build, f"{side}, {what}") for side, what in sides}
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
    title = (
        f"Mask R-CNN, ViT-{args.model.upper()}/16, side {args.size}, batch {args.batch_size}, "
        f"relative positions {'on' if args.rel_pos else 'off'}, {precision} on {device}, "
        f"{torch.get_num_threads()} thread(s), median of {args.repeats} in turn"
    )
    given = {key: str(value) for key, value in vars(args).items()}
    report(title, rows, device, args.json, arguments=given)
