"""Exit statuses and what is printed, and how a command line is read."""

import argparse
import io
import sys
import warnings
from pathlib import Path

import pytest

from flsl_d2.engine.command_line import (
    add_option,
    described_parser,
    named_weights,
    parse_tool_arguments,
    run_tool,
    tool_argument_parser,
)
from flsl_d2.engine.launch import launch
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError

ONE = (1, 1, 0, "auto", (), "cpu")


def odd() -> None:
    raise InputError("the value 7 is odd.")


def test_input_error_of_two_processes_is_one_line_and_status_2(run_main, forked_workers):
    ended = run_main(lambda _: run_tool(launch, odd, 2, *ONE[1:]))
    assert ended == (2, "", "error: the value 7 is odd.\n")


@pytest.mark.parametrize(
    ("raised", "status", "errors"),
    [
        (InputError("the value 7 is odd."), 2, "error: the value 7 is odd.\n"),
        (TrainingError("the loss is NaN."), 3, "error: the loss is NaN.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(STOPPED), STOPPED, ""),
        (None, 0, ""),
    ],
)
def test_how_a_tool_ends(run_main, raised, status, errors):
    def tool() -> None:
        if raised is not None:
            raise raised

    assert run_main(lambda _: run_tool(launch, tool, *ONE)) == (status, "", errors)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        run_tool(launch, lambda: 1 / 0, *ONE)


def test_options_and_overrides_in_any_order():
    parser = tool_argument_parser("x", eval_only=True)
    line = "train.a=1 --config-file c.py b=2 --eval-only --num-gpus 2 +c=-1".split()
    args = parse_tool_arguments(parser, line)
    assert (args.opts, args.eval_only, args.num_gpus) == (["train.a=1", "b=2", "+c=-1"], True, 2)
    args = parse_tool_arguments(parser, ["--config-file", "c.yaml", "SEED", "-1"])
    assert args.opts == ["SEED", "-1"]


def shared_parser() -> argparse.ArgumentParser:
    parser = described_parser("x")
    for name in "output seeds short-side json device score-threshold train".split():
        add_option(parser, f"--{name}")
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    add_option(parser, "--measures", nargs="+")
    add_option(parser, "--weights", type=named_weights, action="append")
    return parser


def test_lists_are_read_with_commas_and_spaces():
    args = shared_parser().parse_args(["--measures", "a,b", "c", "--measures", "b, d"])
    assert args.measures == ["a", "b", "c", "d"]
    assert shared_parser().parse_args(["--seeds", "3,0,3"]).seeds == [3, 0]


def test_paths_start_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = shared_parser().parse_args(
        ["--output=~/out", "--json=~/x.json", "--weights=~/a=b.pth", "--weights=a=~/b.pth"]
    )
    assert args.output == Path("/home/someone/out")
    assert args.json == Path("/home/someone/x.json")
    assert args.weights == [("", "/home/someone/a=b.pth"), ("a", "/home/someone/b.pth")]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("random", ("", "random")),
        ("fair=random:flsl", ("fair", "random:flsl")),
        ("dir/epoch=1.pth", ("", "dir/epoch=1.pth")),
        ("https://host/f.pth?which=student", ("", "https://host/f.pth?which=student")),
        ("moco=https://host/f.pth?which=student", ("moco", "https://host/f.pth?which=student")),
    ],
)
def test_names_are_told_from_paths(text, pair):
    assert named_weights(text) == pair


WRONG = "--seeds=0,x --weights==a --short-side=x --short-side=-1 --device=gpu --device=cuda:x"
WRONG += " --score-threshold=50 --score-threshold=nan --absent"


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_command_line_is_one_sentence(capsys, argument):
    with pytest.raises(SystemExit) as end:
        shared_parser().parse_args([argument])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert argument.partition("=")[0] in errors
    assert errors.count("\n") == 1


def test_a_typing_error_is_answered_with_the_closest_option(capsys):
    with pytest.raises(SystemExit):
        shared_parser().parse_args(["--shrot-side", "3", "--trian", "a", "--hiddem"])
    assert "did you mean --short-side, --train?" in (error := capsys.readouterr().err)
    assert "--hidden" not in error, "hidden names are not offered"


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("a.py", "train.output_dir=o=1 train.device=cpu train.max_iter=3 b=2"),
        ("a.yaml", "OUTPUT_DIR o=1 MODEL.DEVICE cpu SOLVER.MAX_ITER 3 b=2"),
    ],
)
def test_options_of_training_are_short_for_keys(file, given):
    line = f"--config-file {file} --output o=1 --device cpu b=2 --max-iter 3".split()
    assert parse_tool_arguments(tool_argument_parser("x"), line).opts == given.split()


def test_a_console_without_a_character_gets_another(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    described_parser("x")
    print("a ± \udcff", file=console, flush=True)
    assert console.buffer.getvalue() == b"a ? ?\n"
