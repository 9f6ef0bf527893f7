"""Command line of conversions between weight files: ``python -m flsl_d2.weights``."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.engine.command_line import described_parser, run_tool
from flsl_d2.weights.export import FORMATS, convert_checkpoint

DESCRIPTION = (
    "Read an encoder from another project's weight file and write it for this one, or for timm."
)
EPILOG = """read: published FLSL, DINO, iBOT, SelfPatch, MAE, MoCo v3, DINOv2, DeiT, timm,
transformers, Flax (.npz), Segment Anything, ViTDet of Detectron2 (.pkl) and this project's files,
under any stack of wrappers and prefixes. No code in a file is ever run. docs/CHECKPOINTS.md says
what is kept of each.

examples:
  the teacher of a DINO run, for a Detectron2 project:
    tools/convert_checkpoint.py dino_vits16_checkpoint.pth dino_s16.pth
  its student, with a list of every weight:
    tools/convert_checkpoint.py dino_vits16_checkpoint.pth student.pth --which student \\
      --report student.json
  an encoder pre-trained here, for timm:
    tools/convert_checkpoint.py teacher_backbone.pth flsl_timm.safetensors --to timm

Converting is optional: train.init_checkpoint and MODEL.WEIGHTS take the same files as they are
(with ?which=student at the end for a student)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the file that a command line names."""
    parser = described_parser(DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("source", metavar="INPUT", help="weight file or URL")
    add("target", metavar="OUTPUT", help="file to write, .pth or .safetensors")
    add(
        "--to",
        choices=FORMATS,
        help="d2: an encoder file for Detectron2 projects (.pth); safetensors: the same without "
        "any pickle; timm: tensors by timm's names (default: by the suffix, d2 or safetensors)",
    )
    add(
        "--which",
        metavar="NAME",
        help="set of weights to take from a file with several, e.g. student or state_dict_ema "
        "(default: the one that the file's project evaluates: the teacher; for MoCo v3 the base "
        "encoder, which is its student; the model where its moving average lies beside it)",
    )
    add("--report", metavar="FILE", help="JSON file for the account of every weight")
    add(
        "--num-heads",
        type=int,
        metavar="N",
        help="number of attention heads, which no tensor tells (default: that of the published "
        "models of the same width)",
    )
    args = vars(parser.parse_args(arguments))
    if args["num_heads"] is None:
        del args["num_heads"]
    run_tool(lambda: convert_checkpoint(**args))


if __name__ == "__main__":
    main()
