"""From annotations to a detector with one command: ``python -m flsl_d2.detection.finetune``."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flsl_d2.annotations.coco_file import keep_coco, read_coco
from flsl_d2.detection.finetune_data import (
    OwnData,
    absolute_path,
    prepare_data,
    prepare_encoder,
)
from flsl_d2.detection.finetune_plan import (
    InFolder,
    Plan,
    anchor_warnings,
    config_text,
    find_device,
    literal,
    make_plan,
)
from flsl_d2.detection.finetune_report import draw_labels, write_report
from flsl_d2.detection.predictor import Predictor
from flsl_d2.detection.train import launch_detection
from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    described_parser,
    parse_tool_arguments,
    run_tool,
    tool_argument_parser,
)
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.gpus import check_device
from flsl_d2.engine.launchers import started_processes
from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder, write_text
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import channels_format
from flsl_d2.images.stored_values import channel_statistics

CONFIG_FILE = "finetune.py"
_SUMMARY_FILE = "plan.txt"
_RECIPES = {
    "masks": "coco/mask_rcnn_flsl_vit_s16_1x.py",
    "boxes": "coco/faster_rcnn_flsl_vit_s16_1x.py",
}
EXAMPLES = """examples:
  boxes or masks, whatever the annotations have, from a pre-trained encoder:
    tools/finetune.py --annotations parts/all.json --images parts/images \\
        --weights teacher_backbone.pth --output output/parts
  YOLO labels, frames of one video kept together, an encoder that stays as it is, on the CPU:
    tools/finetune.py --annotations parts/labels --images parts/images --val-group '(video\\d+)' \\
        --weights teacher_backbone.pth --freeze --device cpu --output output/parts
  go on with an interrupted run:
    tools/finetune.py --output output/parts --resume"""


def _finetune(args: argparse.Namespace) -> None:
    if (count := started_processes()) > 1:
        raise InputError(
            f"{count} processes were started from outside, and each would prepare the data; start "
            "this tool once and give it --num-gpus."
        )
    output = Path(args.output).expanduser()
    if args.resume:
        if not (output / CONFIG_FILE).is_file():
            raise InputError(
                f"--output is '{output}', which holds no run of this tool to resume; leave "
                "--resume out to start one."
            )
        _check_places(args, output)
        print(
            f"Going on with {output}: its {CONFIG_FILE} decides; of other options only --images "
            "and --val-images are used."
        )
    else:
        _check_options(args, output)
        _prepare(args, output)
    cfg = load_lazy_config(str(output / CONFIG_FILE))
    parser = tool_argument_parser("", eval_only=True)
    options = ["--config-file", str(output / CONFIG_FILE), "--num-gpus", str(args.num_gpus)]
    launch_detection(parse_tool_arguments(parser, options + ["--resume"] * args.resume))
    _report(output, cfg)


def _check_places(args: argparse.Namespace, output: Path) -> None:
    """Check that the data are where the config of a run says; put new folders of pictures in it."""
    config = output / CONFIG_FILE
    for split, folder in (("train", args.images), ("test", args.val_images or args.images)):
        if folder:
            key = f"dataloader.{split}.dataset.image_root"
            line = f"{key} = {literal(absolute_path(folder))}"
            text = config.read_text("utf-8")
            write_text(config, re.sub(rf"(?m)^{re.escape(key)} = .*$", lambda _: line, text))  # noqa: B023
    cfg = load_lazy_config(str(config))
    for split in ("train", "test"):
        for key in ("json_file", "image_root"):
            path = cfg.dataloader[split].dataset[key]
            if not Path(path).exists():
                raise InputError(
                    f"dataloader.{split}.dataset.{key} in '{config}' is '{path}', which does not "
                    "exist; if the data have moved, change that line, or give --images for the "
                    "folder of the pictures."
                )


def _check_options(args: argparse.Namespace, output: Path) -> None:
    missing = [f"--{n}" for n in ("annotations", "images", "weights") if not getattr(args, n)]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given; --help has examples.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"--output is '{output}', which exists; go on with the run in it by --resume, or name "
            "another folder."
        )
    if not Path(args.images).is_dir():
        raise InputError(f"--images is '{args.images}', which is not a folder; check the path.")
    for name in ("batch_size", "patience"):
        if getattr(args, name) < 0:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(args, name)}; give 0 or more.")
    if args.num_gpus < 1 or args.batch_size % args.num_gpus:
        raise InputError(
            f"--batch-size is {args.batch_size} and --num-gpus {args.num_gpus}; give at least one "
            "process and a batch that they can share equally."
        )
    check_device(args.device, args.num_gpus)


def _prepare(args: argparse.Namespace, output: Path) -> None:
    with TemporaryDirectory() as name:
        staging = Path(name)
        try:
            data = prepare_data(args, staging)
        except InputError as error:  # the folder is gone when the message is read
            raise InputError(str(error).replace(f"{staging}/", "")) from error
        encoder_lines, settings, sizes = prepare_encoder(
            args.weights, args.freeze, data.channels or 3, staging
        )
        device = find_device(args.device)
        wanted = args.max_iter, args.short_side, args.batch_size, args.num_gpus
        plan = make_plan(data.facts, device, sizes, *wanted)
        warnings = anchor_warnings(data.facts, plan.short_side)
        lines = [*data.lines, *encoder_lines, *_plan_lines(plan, args, data)]
        lines = [printable(line) for line in (*lines, *(f"warning: {w}" for w in warnings))]
        settings += _settings(args, data, plan, staging)
        recipe = _RECIPES["masks" if data.has_masks else "boxes"]
        write_text(staging / CONFIG_FILE, config_text(recipe, settings))
        write_text(staging / _SUMMARY_FILE, "\n".join(lines) + "\n")
        load_lazy_config(str(staging / CONFIG_FILE))
        draw_labels(data.records, data.names, staging / "labels.png")
        writable_folder(output, "--output")
        own = [path for path in (data.train, data.val) if path.is_relative_to(staging)]
        contents = {output / path.relative_to(staging): read_coco(path) for path in own}
        for path in staging.iterdir():
            shutil.move(str(path), str(output))
        for path, content in contents.items():
            keep_coco(path, content)
    print("\n".join(lines))
    print(f"Look at {output}/labels.png: training starts with these labels.", flush=True)


def _settings(
    args: argparse.Namespace, data: OwnData, plan: Plan, staging: Path
) -> list[tuple[str, Any, str]]:
    """List what differs from the recipe: key, value and reason."""
    why = plan.reasons

    def final(path: Path) -> str:
        if path.is_relative_to(staging):
            return InFolder(path.relative_to(staging))
        return absolute_path(path)

    train, test = (f"dataloader.{split}.mapper.augmentations[0]" for split in ("train", "test"))
    settings: list[tuple[str, Any, str]] = [
        ("dataloader.train.dataset.json_file", final(data.train), ""),
        ("dataloader.train.dataset.image_root", absolute_path(args.images), ""),
        ("dataloader.test.dataset.json_file", final(data.val), ""),
        ("dataloader.test.dataset.image_root", absolute_path(args.val_images or args.images), ""),
        ("model.roi_heads.num_classes", len(data.names), ""),
        (f"{train}.short_edge_length", plan.train_sides, why.get("short_side", "--short-side")),
        (f"{train}.max_size", plan.max_side, ""),
        (f"{test}.short_edge_length", plan.short_side, ""),
        (f"{test}.max_size", plan.max_side, ""),
        ("dataloader.train.total_batch_size", plan.batch_size, why["batch_size"]),
        ("dataloader.train.num_workers", plan.workers, ""),
        ("dataloader.test.num_workers", plan.workers, ""),
        ("optimizer.lr", plan.learning_rate, why["learning_rate"]),
        ("train.max_iter", plan.max_iter, why["max_iter"]),
        ("lr_multiplier.warmup_length", plan.warmup_length, f"{plan.warmup_steps} steps"),
        ("train.eval_period", plan.eval_period, ""),
        ("train.checkpointer.period", plan.eval_period, ""),
        ("train.checkpointer.max_to_keep", 1, ""),
        ("train.log_period", plan.log_period, ""),
        ("train.best_metric", "segm/AP" if data.has_masks else "bbox/AP", ""),
        ("train.patience", args.patience, ""),
        ("train.seed", args.seed, ""),
        ("train.device", args.device, ""),
        ("train.output_dir", InFolder(""), ""),
    ]
    if not find_device(args.device).is_gpu:
        settings += _small_heads(data.has_masks)
    if plan.recompute:
        settings.append(("model.backbone.net.use_act_checkpoint", True, why["recompute"]))
    if data.channels:
        files = [record["file_name"] for record in data.records]
        mean, std = channel_statistics(files, data.channels)
        settings += [
            ("model.input_format", channels_format(data.channels), "values as they are stored"),
            ("model.pixel_mean", mean, "of the training images"),
            ("model.pixel_std", std, ""),
        ]
    return settings


def _small_heads(has_masks: bool) -> list[tuple[str, Any, str]]:
    """List settings of a pyramid and heads that a CPU trains in a third of the time."""
    heads = "model.roi_heads"
    settings: list[tuple[str, Any, str]] = [
        ("model.backbone.out_channels", 128, "half the channels, for a CPU"),
        ("model.proposal_generator.head.in_channels", 128, ""),
        ("model.proposal_generator.post_nms_topk", [500, 300], ""),
        (f"{heads}.batch_size_per_image", 128, "a quarter of the usual proposals, for a CPU"),
        (f"{heads}.box_head.input_shape.channels", 128, ""),
        (f"{heads}.box_head.conv_dims", [], "convolutions of proposals take most of the time"),
        (f"{heads}.box_head.fc_dims", [512, 512], ""),
        (f"{heads}.box_predictor.input_shape.channels", 512, ""),
    ]
    if has_masks:
        settings += [
            (f"{heads}.mask_head.input_shape.channels", 128, ""),
            (f"{heads}.mask_head.conv_dims", [128, 128, 128], ""),
        ]
    return settings


def _plan_lines(plan: Plan, args: argparse.Namespace, data: OwnData) -> list[str]:
    kind = "Mask R-CNN (boxes and masks)" if data.has_masks else "Faster R-CNN (boxes)"
    frozen = "; the encoder stays as it is" if args.freeze else ""
    stop = f", stopping after {args.patience} without a gain" if args.patience else ""
    why = plan.reasons
    return [
        f"Detector: {kind} on {args.device}{frozen}.",
        f"Images: shorter side {plan.short_side} pixels, in training {plan.train_sides[0]} to "
        f"{plan.train_sides[-1]}" + (f" ({why['short_side']})." if "short_side" in why else "."),
        f"Batch: {plan.batch_size} images; {why['batch_size']}. Gradients are not accumulated.",
        f"Length: {plan.max_iter} steps, {why['max_iter']}; warm-up of {plan.warmup_steps} steps. "
        "The log says after 20 steps how long the run takes.",
        f"Learning rate: {plan.learning_rate:g} ({why['learning_rate']}), a tenth after two thirds "
        "of the steps and a hundredth after eleven twelfths.",
        f"Evaluation: every {plan.eval_period} steps; the best weights are kept as "
        f"model_best.pth{stop}.",
    ]


def _report(output: Path, cfg: Any) -> None:
    """Evaluate the best weights, write the report and say how to go on."""
    data, plan = cfg.dataloader.test.dataset, output / _SUMMARY_FILE
    summary = plan.read_text().splitlines() if plan.is_file() else []
    seen = cfg.train.max_iter * cfg.dataloader.train.total_batch_size
    hints = [
        f"The run has {cfg.train.max_iter} steps of {cfg.dataloader.train.total_batch_size} "
        f"images ({seen} images seen); below a few thousand that is often too few: raise "
        "--max-iter.",
        *(line.removeprefix("warning: ") for line in summary if line.startswith("warning: ")),
        f"Look at {output}/labels.png: are boxes and classes right?",
    ]
    predictor = Predictor(output, device=cfg.train.device, score_threshold=0.0, trust_config=True)
    predict = f"--model {output} --input IMAGES --output {output}/predictions"
    predict = _command("predict.py", "flsl_d2.detection.predict", predict)
    export = f"--model {output} --format onnx --output {output}/detector.onnx"
    export = _command("export_model.py", "flsl_d2.export", export)
    report = write_report(
        output, predictor, data.json_file, data.image_root, summary, hints, [predict, export]
    )
    names = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")
    values = [f"{name} {report.figures[name]:.1f}" for name in names if name in report.figures]
    print(f"{', '.join(values)} on the validation images.", *report.notes, sep="\n")
    print(f"Report: {report.page}")
    print(f"Predict with: {predict} --score-threshold {report.score_threshold:.2f}")
    print(f"Export with: {export}")


def _command(file: str, module: str, options: str) -> str:
    tool = Path(sys.argv[0])
    called = tool.name == "finetune.py" and tool.parent.name == "tools"
    return f"python {tool.with_name(file) if called else f'-m {module}'} {options}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = described_parser(
        "Train a detector on annotations of your own: check and split the data, choose the "
        "settings, train, keep the best weights, and report.",
        EXAMPLES,
    )
    add = parser.add_argument
    for name, kind, text in (
        ("--annotations", "PATH", "COCO .json; YOLO, Pascal VOC or LabelMe folder; CVAT .xml"),
        ("--images", "DIR", "folder of the images"),
        ("--val-annotations", "PATH", "to validate on (default: split off from --annotations)"),
        ("--val-images", "DIR", "their images (default: --images)"),
    ):
        add(name, default="", metavar=kind, help=text)
    add_defaults(
        parser,
        ("--val-share", 0.2, "share of the images to split off"),
        ("--val-group", "", "regular expression; images with the same match stay together"),
    )
    encoder = "encoder: file or URL of any known layout, timm:NAME, or 'random'"
    add_option(parser, "--weights", default="", help=encoder)
    add_option(parser, "--output", default="output/finetune")
    add("--task", choices=("boxes", "masks"), help="default: masks if the annotations have them")
    add("--freeze", action="store_true", help="leave the encoder as it is")
    add_option(parser, "--device")
    add_option(parser, "--num-gpus")
    add_defaults(
        parser,
        ("--batch-size", 0, "images of a step; 0 chooses it"),
        ("--patience", 0, "evaluations without a gain after which training stops; 0 never stops"),
        ("--seed", 0, "seed of the split and the training"),
    )
    add_option(parser, "--max-iter", default=0, help="number of steps; 0 chooses it")
    add_option(parser, "--short-side", default=0, help="shorter side in pixels; 0 chooses it")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    run_tool(_finetune, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
