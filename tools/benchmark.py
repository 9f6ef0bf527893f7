#!/usr/bin/env python
"""Measure speed and memory on this machine, ours and a reference in turn."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.engine.command_line import described_parser, run_tool
from pretrain.studies.benchmark import reference
from pretrain.studies.benchmark.data import benchmark_data, benchmark_end_to_end
from pretrain.studies.benchmark.detection import SIZES, benchmark_detection
from pretrain.studies.benchmark.scaling import benchmark_scaling
from pretrain.studies.benchmark.step import VARIANTS, benchmark_step

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
EXAMPLES = f"""examples:
  tools/benchmark.py data --images photos
  tools/benchmark.py pretrain-step --device cuda --batch-size 64 --variants eager,packed+compiled
  tools/benchmark.py end-to-end --images photos --device cuda --batch-size 256 --workers 16
  tools/benchmark.py detection --device cuda --model b --size 1024 --batch-size 2
  tools/benchmark.py scaling --device cuda --plot scaling.png

A reference module: {reference.__doc__}"""


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    subparsers = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def add(name: str, function, doc: str, batch_size: int = 8) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.set_defaults(function=function)
        option = sub.add_argument
        option("--repeats", type=int, default=10, help="measurements of each (default: 10)")
        option("--warmup", type=int, default=3, help="runs before the first (default: 3)")
        option("--json", metavar="FILE", help="write the figures and the machine here")
        if function is not benchmark_data:
            option("--device", default="cpu", help="cpu or cuda (default: cpu)")
            option("--precision", default="auto", help="fp32, bf16, fp16 or auto (default)")
            option("--threads", type=int, help="threads on the CPU (default: PyTorch's choice)")
            option("--batch-size", type=int, default=batch_size, metavar="N")
        if function is not benchmark_detection:
            option("--config-file", default=CONFIG, metavar="FILE")
            option("opts", nargs="*", metavar="key=value", help="changes to the config")
        if function not in (benchmark_detection, benchmark_scaling):
            option("--reference-module", metavar="FILE", help="a Python file to compare with")
        return sub

    data = add("data", benchmark_data, "from image files to what the device receives, one core")
    data.add_argument("--images", required=True, metavar="FOLDER")
    data.add_argument("--num-images", type=int, default=50, help="files to use (default: 50)")
    step = add("pretrain-step", benchmark_step, "a pre-training step on a fixed batch")
    step.add_argument(
        "--variants",
        type=lambda names: names.split(","),
        default=["eager", "packed"],
        metavar="NAMES",
        help=f"with commas, of: {', '.join(VARIANTS)}; joined by + where several are to be taken "
        "(default: eager,packed)",
    )
    whole = add("end-to-end", benchmark_end_to_end, "from image files to updated weights")
    whole.add_argument("--images", required=True, metavar="FOLDER")
    whole.add_argument("--workers", type=int, default=0, help="data workers (default: 0)")
    whole.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    detection = add(
        "detection", benchmark_detection, "Mask R-CNN against Detectron2's own ViT", batch_size=2
    )
    detection.add_argument("--model", choices=list(SIZES), default="b", help="ViT (default: b)")
    detection.add_argument("--size", type=int, default=1024, help="pixels (default: 1024)")
    detection.add_argument("--rel-pos", action="store_true", help="with relative positions")
    detection.add_argument("--backbone-only", action="store_true", help="without the detector")
    scaling = add("scaling", benchmark_scaling, "growth with batch, resolution, crops and K")
    scaling.add_argument("--batches", type=_integers, default=[2, 4, 8, 16], metavar="N,N")
    scaling.add_argument("--plot", default="scaling.png", metavar="PNG")

    args = parser.parse_args()
    run_tool(args.function, args)


if __name__ == "__main__":
    main()
