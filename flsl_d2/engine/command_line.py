"""Options and exit statuses that all command-line tools share.

An option that means the same in several tools is declared once, in :data:`SHARED_OPTIONS`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch

from flsl_d2.engine.gpus import check_device
from flsl_d2.engine.launch import WorkerError, leave
from flsl_d2.engine.launchers import started_by_torchrun
from flsl_d2.engine.log_lines import quiet_libraries
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import expand_home, plain_line

# Warnings of third parties that a user of the tools can do nothing about: the category and the
# start of the message, without colons and commas, because they separate the fields and the
# entries of PYTHONWARNINGS.
_HARMLESS = (
    (UserWarning, "pkg_resources is deprecated as an API"),
    (UserWarning, "torch.meshgrid"),
    (FutureWarning, "Importing from timm.models.layers is deprecated"),
    (FutureWarning, "`torch.cuda.amp"),
    # Their new names exist since PyTorch 2.13 alone.
    (FutureWarning, "`broadcast_buffers` is deprecated"),
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated"),
)


def run_tool(function: Callable[..., Any], *args: Any) -> None:
    """Run a tool and end this process with its status.

    The status is 0 when the function returns, 2 after an :class:`InputError` and 3 after a
    :class:`TrainingError` (``error: ...`` on stderr, no traceback), 1 when a worker process failed
    (with the worker's error on stderr), 75 after a request to stop
    (:mod:`flsl_d2.engine.stopping`), and 130 after Ctrl-C. Any other exception is a defect of the
    program and keeps its traceback.
    """
    _quiet_third_parties()
    try:
        function(*args)
    except (InputError, TrainingError) as error:
        print(f"error: {plain_line(error)}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 3
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except SystemExit as stopped:
        if stopped.code != STOPPED:
            raise
        status = STOPPED
    else:
        status = 0
    if started_by_torchrun():
        leave(status)
    sys.stdout.flush()
    sys.exit(status)


class _ToolParser(argparse.ArgumentParser):
    """Parser that expands ``~`` in paths, and reports an error in one sentence."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            setattr(found, name, expand_home(value))
        return found, rest

    def error(self, message: str) -> NoReturn:
        words = re.findall(r"(?<=\s)--[a-z][\w-]*", message.partition("unrecognized")[2])
        close = [find for w in words for find in get_close_matches(w, self._option_strings(), n=1)]
        hint = f": did you mean {', '.join(dict.fromkeys(close))}?" if close else ";"
        self.exit(2, f"error: {plain_line(message)}{hint} --help lists the options.\n")

    def _option_strings(self) -> list[str]:
        shown = (a for a in self._actions if a.help != argparse.SUPPRESS)
        return [text for action in shown for text in action.option_strings]


def described_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Make a parser of a tool: help is printed as written, and options are not abbreviated.

    The epilog has examples of complete commands.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name == "flsl_d2.__main__":
        prog = sys.argv[0] if sys.argv[0].startswith("flsl-d2 ") else None
    else:
        prog = f"python -m {spec.name.removesuffix('.__main__')}"
    return _ToolParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def device_name(text: str) -> str:
    """Name of a device that this machine has, for ``type`` of an option."""
    try:
        check_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return text


def number(kind: type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """Make a reader of numbers from ``low`` to ``high``, for ``type`` of an option."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            noun = "whole number" if kind is int else "number"
            end = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is no {noun} {end}")
        return value

    return read


def comma_separated(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def seed_list(text: str) -> list[int]:
    parts = comma_separated(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers; write --seeds 0,1"
        )
    return [int(part) for part in parts]


def named_weights(text: str) -> tuple[str, str]:
    """Name and source of ``NAME=FILE``; the name is empty where only a file is given."""
    name, equals, source = text.partition("=")
    # A "=" behind a slash or a question mark is part of a path without a name.
    if not equals or "/" in name or "?" in name:
        name, source = "", text
    if (equals and text.startswith("=")) or not source:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form NAME=FILE; write flsl=teacher.pth"
        )
    return name, os.path.expanduser(source)


class _CollectLists(argparse.Action):
    """Collect the items of all lists that an option is given, each item once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        lists = values if self.nargs else [values]
        items = [*(getattr(namespace, self.dest) or []), *(i for part in lists for i in part)]
        setattr(namespace, self.dest, list(dict.fromkeys(items)))


class _SetKey(argparse.Action):
    """Collect keys of the config, for a .py and for a YAML one, with their values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.keys = [*(namespace.keys or []), (*self.const, values)]


def _option(metavar: str, help_text: str, **settings: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": help_text, **settings}


_WEIGHTS = "encoder: file or URL of any known layout, or 'random' for an untrained ViT-S/16"
_DATA = "registered data set, ANNOTATIONS.json:IMAGES, or folder with a subfolder for each class,"
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--config-file": _option(
        "FILE", "config to run; a path, or a name below configs/", required=True
    ),
    "--weights": _option("FILE", _WEIGHTS),
    "--train": _option("NAME", f"{_DATA} to learn labels from", default=""),
    "--val": _option("NAME", f"{_DATA} to score on", default=""),
    "--measures": _option(
        "A,B", "measures of frozen features", action=_CollectLists, type=comma_separated
    ),
    "--davis-root": _option(
        "DIR", "DAVIS 2017, with JPEGImages, Annotations and ImageSets", type=Path
    ),
    "--max-images": _option(
        "N", "most images of each data set (default: all)", type=number(int, 1)
    ),
    "--max-iter": _option("N", "number of steps", type=number(int, 0)),
    "--short-side": _option(
        "PX",
        "shorter side of images in pixels (default: %(default)s)",
        type=number(int, 0),
        default=448,
    ),
    "--seeds": _option("0,1", "seeds, one run each", type=seed_list),
    "--output": _option("DIR", "folder to write to (default: %(default)s)", type=Path),
    "--json": _option("FILE", "JSON file to write the results to", type=Path),
    "--device": _option(
        "NAME", "cuda or cpu (default here: %(default)s)", type=device_name, default=_DEVICE
    ),
    "--score-threshold": _option(
        "P",
        "leave out detections with a lower score (default: %(default)s)",
        type=number(float, 0, 1),
        default=0.5,
    ),
    "--num-gpus": _option(
        "N",
        "GPUs of this machine; on the CPU, processes (default: 1)",
        type=number(int, 1),
        default=1,
    ),
    "--gpus-per-job": _option("N", "GPUs of each job (default: 1)", type=number(int, 1), default=1),
}


# Options of training tools that set keys of a config, as .py and as YAML.
CONFIG_OPTIONS = {
    "--output": ("train.output_dir", "OUTPUT_DIR"),
    "--max-iter": ("train.max_iter", "SOLVER.MAX_ITER"),
    "--device": ("train.device", "MODEL.DEVICE"),
}


def add_option(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    parser.add_argument(name, **(SHARED_OPTIONS[name] | changes))


def add_defaults(parser: argparse.ArgumentParser, *options: tuple[str, Any, str]) -> None:
    """Add options of one tool that have a default: their names, defaults and helps."""
    for name, default, text in options:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} (default: %(default)s)"
        )


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add ``key=value`` arguments as ``opts``, for :func:`parse_tool_arguments` to read."""
    parser.add_argument("opts", nargs="*", metavar="key=value", help=help_text)


def tool_argument_parser(
    description: str, epilog: str = "", eval_only: bool = False, config_required: bool = True
) -> argparse.ArgumentParser:
    """Make a parser for :func:`parse_tool_arguments` with the options of all training tools."""
    parser = described_parser(description, epilog)
    add_option(parser, "--config-file", required=config_required)
    switches = {
        "--resume": "continue from the last checkpoint in the output folder, if there is one",
        "--allow-changes": "with --resume: continue although the config differs from the run's",
        "--overwrite": "without --resume: start anew although the output folder holds a run",
    }
    if eval_only:
        switches["--eval-only"] = "evaluate the weights and stop"
    for name, text in switches.items():
        parser.add_argument(name, action="store_true", help=text)
    add_option(parser, "--num-gpus")
    for name, (key, yaml_key) in CONFIG_OPTIONS.items():
        text = f"short for {key}=..., in a YAML config {yaml_key}"
        keys = (key, yaml_key)
        add_option(parser, name, default=None, help=text, dest="keys", action=_SetKey, const=keys)
    add_defaults(
        parser,
        ("--num-machines", 1, "number of machines"),
        ("--machine-rank", 0, "number of this machine, from 0"),
        ("--dist-url", "auto", "tcp://HOST:PORT where the processes of several machines meet"),
    )
    add_overrides(
        parser,
        "changes to the config: key=value for a .py config, KEY VALUE pairs for a .yaml one; "
        "a leading + adds a key that a .py config does not have",
    )
    return parser


def parse_tool_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the command line; options and overrides may stand in any order.

    Options that are short for keys of the config are put before the other overrides.
    """
    found = parser.parse_intermixed_args(arguments)
    is_yaml = str(getattr(found, "config_file", "")).endswith((".yaml", ".yml"))
    keys = getattr(found, "keys", None) or ()
    given = [([yaml_key, str(v)] if is_yaml else [f"{key}={v}"]) for key, yaml_key, v in keys]
    found.opts = [*itertools.chain(*given), *found.opts]
    return found


def _quiet_third_parties() -> None:
    quiet_libraries()
    for category, start in _HARMLESS:
        warnings.filterwarnings("ignore", message=start, category=category)
    # Worker processes of this tool read the same list from their environment.
    listed = [f"ignore:{start}:{category.__name__}" for category, start in _HARMLESS]
    inherited = os.environ.get("PYTHONWARNINGS")
    os.environ.setdefault("PYTHONIOENCODING", ":replace")
    os.environ["PYTHONWARNINGS"] = ",".join([*listed, inherited] if inherited else listed)
