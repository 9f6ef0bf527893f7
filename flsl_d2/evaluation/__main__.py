"""Command line of the measures of frozen features: ``python -m flsl_d2.evaluation``."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.engine.command_line import add_defaults, add_option, described_parser, run_tool
from flsl_d2.engine.log_lines import start_log
from flsl_d2.evaluation.measures import MEASURES, read_options, report_features

DESCRIPTION = "Measure an encoder's frozen tokens: k-NN, probes, clusters, objects, key points."
EXAMPLES = f"""examples:
  all measures, on 200 images each of COCO's splits:
    tools/eval_features.py --weights output/flsl_vit_small_p16_in1k/teacher_backbone.pth \\
      --train coco_2017_train --val coco_2017_val --max-images 200
  naming the class of whole images, from folders by class:
    tools/eval_features.py --weights timm:vit_tiny_patch16_224 --short-side 224 \\
      --train imagenette/train --val imagenette/val
  naming the object in ImageNet's boxes:
    tools/eval_features.py --weights teacher_backbone.pth --measures knn_box \\
      --train imagenet_boxes_train --val imagenet_boxes_val --short-side 224
  in-context retrieval with the largest memory of the paper:
    tools/eval_features.py --weights teacher_backbone.pth --measures in_context \\
      --train voc_2012_sem_seg_trainaug --val voc_2012_sem_seg_val --option memory_size=10240000

measures: {", ".join(MEASURES)}.
Nothing is fine-tuned, and every image is encoded once for all of them. docs/EVALUATION.md describes
the protocols. A measure that fails is shown as failed with the reason, the others go on, and the
exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the encoder that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    for name in ("--weights", "--train", "--val"):
        add_option(parser, name, required=True)
    suited = "measures to compute (default: those that suit the labels of --train)"
    add_option(parser, "--measures", nargs="+", help=suited)
    for name in ("--max-images", "--short-side", "--device", "--json"):
        add_option(parser, name)
    text = "setting of a protocol, such as side=224 or fractions=[1,8]; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=text)
    add_defaults(parser, ("--seed", 0, "seed of all draws"))
    args = parser.parse_args(arguments)
    start_log(None, 0, ["flsl_d2"])
    settings = vars(args)
    settings["json_file"], texts = settings.pop("json"), settings.pop("option")
    run_tool(lambda: report_features(**settings, **read_options(texts)))


if __name__ == "__main__":
    main()
