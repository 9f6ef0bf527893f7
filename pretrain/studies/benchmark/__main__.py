"""Benchmarks, each with the parsed command line: ``python -m pretrain.studies.benchmark``."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    add_overrides,
    comma_separated,
    described_parser,
    run_tool,
)
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
    reference_function,
    report,
    seconds_of,
    stored_for_backward,
    time_in_turn,
)
from pretrain.studies.benchmark.step import Step, build_trainer, run_step
from pretrain.trainer import PRECISIONS, resolve_precision
from pretrain.views import DEVICE_WORK

DESCRIPTION = "Measure speed and memory on this machine, this project and a reference in turn."
EXAMPLES = """examples:
  tools/benchmark.py data --images photos
  tools/benchmark.py pretrain-step --device cuda --batch-size 64 --variants eager,packed+compiled
  tools/benchmark.py end-to-end --images photos --device cuda --batch-size 256 --workers 16
  tools/benchmark.py detection --device cuda --model b --size 1024 --batch-size 2
  tools/benchmark.py scaling --device cuda
  torchrun --standalone --nproc-per-node 8 tools/benchmark.py processes --device cuda

--reference-module names a Python file, which is run as a program, so name one that you trust. It
has the function of its benchmark:
  data           make_views(path) makes all augmented views of an image file
  pretrain-step  make_step(batch_size, device, precision) returns a function of no arguments that
                 runs one training step on a fixed batch
  end-to-end     make_run(files, batch_size, workers, device, precision) returns a function of no
                 arguments that runs one training step on the next images of the files"""

Runner = Callable[[], Any]

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


def overrides_of(variant: str) -> list[str]:
    """Return the overrides of a variant such as ``packed+compiled``; InputError if unknown."""
    unknown = [part for part in variant.split("+") if part not in VARIANTS]
    if unknown:
        raise InputError(
            f"--variants has {', '.join(unknown)}; known are {', '.join(VARIANTS)}, and several "
            "joined by +."
        )
    return [override for part in variant.split("+") for override in VARIANTS[part]]


def _device(args: argparse.Namespace) -> torch.device:
    """Set the number of CPU threads, and return the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def _reference(args: argparse.Namespace, name: str, *given: Any) -> dict[str, Callable[[], Any]]:
    """Return the maker of the reference, where a reference is given."""
    file = args.reference_module
    return {"reference": partial(reference_function(file, name), *given)} if file else {}


def _rows(
    heading: str,
    timings: Mapping[str, Timing],
    count: int,
    more: Callable[[str, Timing], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Make a row of each timing: images a second, ratio to the first, and more columns."""
    first, base = next(iter(timings.items()))
    return [
        {
            heading: name,
            "images/s": timing.rate(count),
            f"ratio to {first}": timing.speed_against(base),
            **more(name, timing),
        }
        for name, timing in timings.items()
    ]


def benchmark_data(args: argparse.Namespace) -> None:
    """Measure each division of work between worker and device, and decoding alone, on one core."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = load_lazy_config(args.config_file, args.opts)
    files, epochs = find_images(args.images)[: args.num_images], itertools.count()

    def views_of(dataset: PretrainDataset, file: str) -> object:
        # The epoch is part of the seed, so every repetition draws anew.
        return dataset[next(epochs), files.index(file)]

    def over_files(make: Callable[[str], object]) -> Runner:
        return lambda: [make(file) for file in files]

    makers: dict[str, Callable[[str], object]] = {}
    if args.reference_module:
        makers["reference"] = reference_function(args.reference_module, "make_views")
    for work, reduced in itertools.product(DEVICE_WORK, (False, True)):
        cfg.views.update(on_device=work, reduced_decoding=reduced)
        dataset = PretrainDataset(files, instantiate(cfg.views))
        makers[_WORK[work] + "; reduced decoding" * reduced] = partial(views_of, dataset)
    makers["decoding alone"] = read_rgb
    steps = {name: partial(over_files, make) for name, make in makers.items()}
    timings = time_in_turn(steps, args.repeats, args.warmup, torch.device("cpu"))
    rows = _rows(
        "data path of one core",
        timings,
        len(files),
        lambda _, timing: {"spread": float(np.ptp(timing.seconds) / (timing.median or 1))},
    )
    title = f"{len(files)} files of {args.images}, {args.repeats} repetitions in turn, one thread"
    report(title, rows, args, seconds={name: t.seconds for name, t in timings.items()})


def benchmark_step(args: argparse.Namespace) -> None:
    """Measure speed, memory and operations of each variant, and of a reference."""
    overrides = {name: [NOT_COMPILED, *args.opts, *overrides_of(name)] for name in args.variants}
    device = _device(args)
    common = (args.batch_size, device, args.precision)
    makers = _reference(args, "make_step", *common)
    makers |= {name: partial(Step, args.config_file, o, *common) for name, o in overrides.items()}
    # None of the variants changes what has to be computed; recomputed blocks do not count.
    plain = [*args.opts, *VARIANTS["eager"], "model.backbone.use_act_checkpoint=False"]
    flops = Step(args.config_file, plain, 2, device, args.precision).flops_per_image()
    timings = time_in_turn(makers, args.repeats, args.warmup, device)

    def more(name: str, timing: Timing) -> dict[str, Any]:
        step, rate, kept = timing.function, timing.rate(args.batch_size), None
        own = isinstance(step, Step)
        if isinstance(step, Step) and "train.compile=True" not in overrides[name]:
            kept = step.stored_bytes() / args.batch_size / 2**20
        return {
            "s/step": timing.median,
            "peak GiB": timing.peak_gib,
            "MiB/image kept for backward": kept,
            "GFLOP/image": flops / 1e9 if own else None,
            "TFLOP/s": rate * flops / 1e12 if rate and own else None,
        }

    rows = _rows("step", timings, args.batch_size, more)
    title = (
        f"batch {args.batch_size}, {args.precision} on {device}, {torch.get_num_threads()} "
        f"thread(s), median of {args.repeats} steps in turn"
    )
    report(title, rows, args, seconds={name: t.seconds for name, t in timings.items()})


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
    device = _device(args)
    files = open_images(args.images)  # shards as well
    common = (args.batch_size, args.workers, device, args.precision)
    sides = _reference(args, "make_run", files, *common)
    sides[OWN] = partial(_Run, args, files, device)
    sides[WITHOUT_FILES] = partial(_Run, args, files, device, read=False)
    timings = {name: Timing(make) for name, make in sides.items()}
    waited = 0.0
    rounds = [name for _ in range(args.rounds) for name in sides]
    for name in tqdm(rounds, desc="end-to-end", unit="side", disable=None):
        step = sides[name]()
        seconds_of(step, args.warmup)
        timings[name].seconds.append(seconds_of(step, args.repeats))
        if name == OWN:
            waited += sum(step.waits[-args.repeats :])
        del step
        gc.collect()  # ends its workers as well
    rows = _rows(
        "run",
        timings,
        args.batch_size * args.repeats,
        lambda name, t: {"data wait": waited / sum(t.seconds) if name == OWN else None},
    )
    title = (
        f"{len(files)} files of {args.images}, batch {args.batch_size}, {args.workers} worker(s), "
        f"{args.precision} on {device}, median of {args.rounds} rounds of {args.repeats} steps"
    )
    report(title, rows, args)


def benchmark_processes(args: argparse.Namespace) -> None:
    """Measure steps in the processes that torchrun has started, or in this one alone.

    The exchange of gradients is what a step takes longer than the same step without it, so the part
    that is hidden behind the backward pass does not count.
    """
    launch(_measure_processes, 1, args=(args,), device=args.device)


def _measure_processes(args: argparse.Namespace) -> None:
    device = _device(args)
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

    whole, alone = median(partial(run, wrapped)), median(partial(run, plain))
    row = {
        "processes": world_size,
        "images/s": args.batch_size * world_size / whole,
        "s/step": whole,
        "share of gradients": max(1 - alone / whole, 0.0),
        "share of numbers": median(exchange_numbers) / whole,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if comm.is_main_process():
        title = f"{args.batch_size} images a process, {args.precision} on {device.type}"
        report(title, [row], args)


def benchmark_scaling(args: argparse.Namespace) -> None:
    """Measure the growth of time and memory over one axis at a time."""
    device = _device(args)
    rows = []
    plan = [(key, value) for key, values in GROWTH.items() for value in values]
    batches = [("batch", int(size)) for size in args.batches]
    for key, value in tqdm([*batches, *plan], desc="scaling", disable=None):
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
    report(f"growth on {device}", rows, args)


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
    device = _device(args)
    precision = resolve_precision(args.precision, device.type)
    dtype = PRECISIONS[precision]
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    inputs = _noise_with_objects(args.batch_size, args.size, device)

    def build(side: str, what: str) -> Runner:
        torch.manual_seed(0)  # both get the same detector
        cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py", [])
        cfg.model.backbone = None
        model = instantiate(cfg.model)
        model.backbone = pyramids(args.model, args.size, args.rel_pos)[side]
        model.to(device)
        if what == "inference":
            return torch.no_grad()(mixed(partial(model.eval(), inputs)))
        return _Training(model, inputs, mixed)

    sides = itertools.product(("detectron2", "flsl_d2"), ("training", "inference"))
    makers = {f"{side}, {what}": partial(build, side, what) for side, what in sides}
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
    report(title, rows, args)


_STEP = ("--precision", "--threads", "--batch-size")
_DEFAULTS: dict[str, tuple[Any, str]] = {
    "--repeats": (10, "measurements of each"),
    "--warmup": (3, "runs before the first"),
    "--precision": ("auto", "fp32, bf16, fp16 or auto"),
    "--threads": (0, "CPU threads; 0: as many as PyTorch chooses"),
    "--batch-size": (8, "images of a step"),
    "--num-images": (50, "files to use"),
    "--workers": (0, "data workers"),
    "--rounds": (3, "runs of each side, in turn"),
    "--size": (1024, "side of the images in pixels"),
}
BENCHMARKS: dict[str, tuple[Callable[[argparse.Namespace], None], str, tuple[str, ...]]] = {
    "data": (
        benchmark_data, "from image files to what the device receives, one core", ("--num-images",)
    ),
    "pretrain-step": (benchmark_step, "a pre-training step on a fixed batch", _STEP),
    "end-to-end": (
        benchmark_end_to_end, "from image files to updated weights",
        (*_STEP, "--workers", "--rounds"),
    ),
    "detection": (
        benchmark_detection, "Mask R-CNN against Detectron2's own ViT", (*_STEP, "--size")
    ),
    "processes": (benchmark_processes, "a step of several processes, under torchrun", _STEP),
    "scaling": (benchmark_scaling, "growth with batch, resolution, crops and K", _STEP),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    commands = {}
    for name, (function, text, options) in BENCHMARKS.items():
        command = commands[name] = benchmarks.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        command.set_defaults(function=function)
        add_option(command, "--json")
        add_defaults(command, *((o, *_DEFAULTS[o]) for o in ("--repeats", "--warmup", *options)))
        if name != "data":
            add_option(command, "--device")
        if name != "detection":
            config = "configs/pretrain/flsl_vit_small_p16_in1k.py"
            add_option(command, "--config-file", required=False, default=config)
            add_overrides(command, "changes to the config")
        if name in ("data", "end-to-end"):
            command.add_argument("--images", required=True, metavar="FOLDER")
        if name in ("data", "end-to-end", "pretrain-step"):
            add_defaults(command, ("--reference-module", "", "Python file to compare with"))
    commands["pretrain-step"].add_argument(
        "--variants",
        type=comma_separated,
        default=["eager", "packed"],
        metavar="A,B",
        help=f"variants of the step, of {', '.join(VARIANTS)}; joined by + where several are to be "
        "taken together (default: eager,packed)",
    )
    detection = commands["detection"]
    detection.add_argument("--model", choices=list(SIZES), default="b", help="ViT (default: b)")
    detection.add_argument("--rel-pos", action="store_true", help="with relative positions")
    detection.set_defaults(batch_size=2)
    commands["scaling"].add_argument(
        "--batches", type=comma_separated, default=["2", "4", "8", "16"], metavar="N,N"
    )
    args = parser.parse_args(arguments)
    run_tool(args.function, args)


if __name__ == "__main__":
    main()
