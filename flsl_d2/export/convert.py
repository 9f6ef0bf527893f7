"""The short way to export an encoder's file: ``python -m flsl_d2.export.convert``."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.engine.command_line import described_parser
from flsl_d2.export.__main__ import main as export


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the file of ``INPUT OUTPUT [--to d2|safetensors|timm]``.

    It is ``tools/export_model.py --model INPUT --format FORMAT --output OUTPUT``.
    """
    parser = described_parser(
        "Write an encoder's file in another format; short for tools/export_model.py --model INPUT "
        "--format FORMAT --output OUTPUT, whose options it takes.",
        "examples:\n  tools/convert_checkpoint.py dino_vits16_checkpoint.pth dino_s16.pth",
    )
    parser.add_argument("source", metavar="INPUT", help="weight file or URL")
    parser.add_argument("target", metavar="OUTPUT", help="file to write, .pth or .safetensors")
    parser.add_argument(
        "--to",
        choices=("d2", "safetensors", "timm"),
        help="format (default: by the suffix, d2 or safetensors)",
    )
    args, rest = parser.parse_known_args(arguments)
    by_suffix = "safetensors" if args.target.endswith(".safetensors") else "d2"
    names = ["--model", args.source, "--format", args.to or by_suffix, "--output", args.target]
    export([*names, *rest])


if __name__ == "__main__":
    main()
