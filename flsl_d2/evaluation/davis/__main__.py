"""Command line of video object segmentation: ``python -m flsl_d2.evaluation.davis``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from flsl_d2.engine.command_line import add_defaults, add_option, described_parser, run_tool
from flsl_d2.engine.log_lines import start_log
from flsl_d2.evaluation.davis.propagation import Propagation
from flsl_d2.evaluation.davis.run import DavisRun, run_davis

DESCRIPTION = "Segment the videos of DAVIS 2017 with an encoder's frozen tokens: J, F and J&F."
EXAMPLES = """examples:
  the validation split, by the protocol of published numbers:
    tools/eval_davis.py --weights output/flsl_vit_small_p16_in1k/teacher_backbone.pth \\
      --davis-root $DETECTRON2_DATASETS/DAVIS
  masks for the benchmark's server, of a split whose masks are not public:
    tools/eval_davis.py --weights teacher_backbone.pth --split test-dev --masks-only

The first frame's mask is propagated: every token takes the label of its nearest neighbours in the
first frame and the last few. Nothing is trained. docs/EVALUATION.md describes the protocol. A
sequence with missing or unusable files is reported as failed with the reason, the others go on,
and the exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment the sequences that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_option(parser, "--weights", required=True)
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), "DAVIS")
    layout = "with JPEGImages, Annotations and ImageSets (default: $DETECTRON2_DATASETS/DAVIS)"
    add_option(parser, "--davis-root", default=root, help=layout)
    written = "gets masks/<sequence>/<frame>.png and results.json (default: %(default)s)"
    add_option(parser, "--output", default=Path("output/davis"), help=written)
    add_option(parser, "--json", help="results (default: results.json in --output)")
    masks_only = "write masks and compute no scores"
    parser.add_argument("--masks-only", action="store_true", help=masks_only)
    add_option(parser, "--short-side", default=480)
    add_option(parser, "--device")
    add_defaults(
        parser,
        ("--split", "val", "list of sequences"),
        ("--year", "2017", "year of the lists"),
        ("--resolution", "480p", "folder of the frames"),
        ("--radius", 12, "radius of the neighbourhood in tokens; 0: all tokens"),
        ("--context", 7, "number of last frames that give labels"),
        ("--top-k", 5, "number of neighbours that give labels"),
        ("--temperature", 0.1, "temperature of the neighbours' weights"),
        ("--batch-size", 8, "frames encoded at once"),
        ("--seed", 0, "seed of untrained weights"),
    )
    settings = vars(parser.parse_args(arguments))
    names = (field.name for field in fields(Propagation))
    given = {name: settings.pop(name) for name in ("weights", "device", "json", "seed")}
    kinds = {name: settings.pop(name) for name in names}
    root, masks_only = settings.pop("davis_root"), settings.pop("masks_only")
    start_log(None, 0, ["detectron2", "flsl_d2"])

    def run() -> None:
        propagation = Propagation(**kinds)
        davis = DavisRun(root, score=not masks_only, propagation=propagation, **settings)
        run_davis(davis, json_file=given.pop("json"), **given)

    run_tool(run)


if __name__ == "__main__":
    main()
