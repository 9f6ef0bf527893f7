"""Command line of the benchmarks: ``python -m pretrain.studies.benchmark`` in the checkout."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    add_overrides,
    described_parser,
    run_tool,
)
from pretrain.studies.benchmark.benchmarks import (
    SIZES,
    VARIANTS,
    benchmark_data,
    benchmark_detection,
    benchmark_end_to_end,
    benchmark_processes,
    benchmark_scaling,
    benchmark_step,
)

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
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


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _add_benchmark(
    subparsers: Any, name: str, function: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add a benchmark with the options that it shares with others."""
    parser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(function=function)
    add_option(parser, "--json")
    add_defaults(
        parser, ("--repeats", 10, "measurements of each"), ("--warmup", 3, "runs before the first")
    )
    if function is not benchmark_data:
        batch_size = 2 if function is benchmark_detection else 8
        add_option(parser, "--device")
        add_defaults(
            parser,
            ("--precision", "auto", "fp32, bf16, fp16 or auto"),
            ("--threads", 0, "CPU threads; 0: as many as PyTorch chooses"),
            ("--batch-size", batch_size, "images of a step"),
        )
    if function is not benchmark_detection:
        add_option(parser, "--config-file", required=False, default=CONFIG)
        add_overrides(parser, "changes to the config")
    if function in (benchmark_data, benchmark_end_to_end):
        parser.add_argument("--images", required=True, metavar="FOLDER")
    if function in (benchmark_data, benchmark_end_to_end, benchmark_step):
        text = "Python file to compare with"
        parser.add_argument("--reference-module", metavar="FILE", help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    data = _add_benchmark(
        benchmarks, "data", benchmark_data, "from image files to what the device receives, one core"
    )
    add_defaults(data, ("--num-images", 50, "files to use"))
    step = _add_benchmark(
        benchmarks, "pretrain-step", benchmark_step, "a pre-training step on a fixed batch"
    )
    step.add_argument(
        "--variants",
        type=lambda names: names.split(","),
        default=["eager", "packed"],
        metavar="A,B",
        help=f"variants of the step, of {', '.join(VARIANTS)}; joined by + where several are to be "
        "taken together (default: eager,packed)",
    )
    end_to_end = _add_benchmark(
        benchmarks, "end-to-end", benchmark_end_to_end, "from image files to updated weights"
    )
    add_defaults(
        end_to_end, ("--workers", 0, "data workers"), ("--rounds", 3, "runs of each side, in turn")
    )
    detection = _add_benchmark(
        benchmarks, "detection", benchmark_detection, "Mask R-CNN against Detectron2's own ViT"
    )
    detection.add_argument("--model", choices=list(SIZES), default="b", help="ViT (default: b)")
    add_defaults(detection, ("--size", 1024, "side of the images in pixels"))
    detection.add_argument("--rel-pos", action="store_true", help="with relative positions")
    _add_benchmark(
        benchmarks, "processes", benchmark_processes, "a step of several processes, under torchrun"
    )
    scaling = _add_benchmark(
        benchmarks, "scaling", benchmark_scaling, "growth with batch, resolution, crops and K"
    )
    scaling.add_argument("--batches", type=_integers, default=[2, 4, 8, 16], metavar="N,N")
    args = parser.parse_args(arguments)
    run_tool(args.function, args)


if __name__ == "__main__":
    main()
