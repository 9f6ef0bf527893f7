"""Options that all tools share, and errors as one sentence instead of a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from flsl_d2.engine.launch import WorkerError, leave, started_by_torchrun
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import expand_home

__all__ = ["described_parser", "parse_tool_arguments", "run_tool", "tool_argument_parser"]

# Warnings of third parties that a user of the tools cannot act on, as (category, start). The start
# has no colon and no comma, which PYTHONWARNINGS cannot hold.
_HARMLESS = (
    (UserWarning, "pkg_resources is deprecated as an API"),
    (UserWarning, "torch.meshgrid"),
    (FutureWarning, "Importing from timm.models.layers is deprecated"),
    (FutureWarning, "`torch.cuda.amp"),
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
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 3
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
    """Parser that replaces ``~`` at the start of every path; see :func:`expand_home`."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        """Parse as ``ArgumentParser`` does, then replace ``~``."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            setattr(found, name, expand_home(value))
        return found, rest


def described_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Make a parser of a tool: help is printed as written, and options are not abbreviated.

    Args:
        description: purpose of the tool.
        epilog: examples of complete commands.
    """
    return _ToolParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def tool_argument_parser(
    description: str, epilog: str = "", eval_only: bool = False
) -> argparse.ArgumentParser:
    """Make a parser with the options that ``pretrain_net.py`` and ``train_net.py`` share.

    Args:
        description: purpose of the tool.
        epilog: examples of complete commands.
        eval_only: whether the tool has ``--eval-only``.

    Returns:
        A parser for :func:`parse_tool_arguments`.
    """
    parser = described_parser(description, epilog)
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        metavar="FILE",
        help="config to run: a path, or a name below configs/",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in the output folder, if there is one",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="with --resume: continue although the config differs from the run's",
    )
    add(
        "--overwrite",
        action="store_true",
        help="without --resume: start anew although the output folder holds a run",
    )
    if eval_only:
        add("--eval-only", action="store_true", help="evaluate the weights and stop")
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs on this machine; on the CPU, the number of processes (default: 1)",
    )
    add("--num-machines", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--machine-rank", type=int, default=0, metavar="I", help="this machine, from 0")
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT where the processes meet; needed with several machines",
    )
    add(
        "opts",
        nargs="*",
        metavar="override",
        help="changes to the config: key=value for a .py config, KEY VALUE pairs for a .yaml one; "
        "a leading + adds a key that a .py config does not have",
    )
    return parser


def parse_tool_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """Read the command line; options and overrides may stand in any order."""
    return parser.parse_intermixed_args(arguments)


def _quiet_third_parties() -> None:
    for category, start in _HARMLESS:
        warnings.filterwarnings("ignore", message=start, category=category)
    # Worker processes of this tool read the same list from their environment.
    listed = [f"ignore:{start}:{category.__name__}" for category, start in _HARMLESS]
    inherited = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join([*listed, inherited] if inherited else listed)
