"""Exit statuses and what is printed, in real processes."""

import subprocess
import sys

import pytest

from flsl_d2.engine.command_line import parse_tool_arguments, tool_argument_parser

SCRIPT = """
import sys
from flsl_d2.engine.command_line import run_tool
from flsl_d2.engine.launch import launch
from flsl_d2.errors import InputError

def tool(kind):
    if kind == "input": raise InputError("the value 7 is odd.")
    if kind == "interrupt": raise KeyboardInterrupt
    if kind == "defect": raise ZeroDivisionError("ours")

if __name__ == "__main__":
    kind, count = sys.argv[1], int(sys.argv[2])
    run_tool(launch, tool, count, 1, 0, "auto", (kind,), "cpu")
"""


def run(tmp_path, kind, count=1):
    path = tmp_path / "tool.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), kind, str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("count", [1, 2])
def test_input_error_is_one_line_and_status_2(tmp_path, count):
    done = run(tmp_path, "input", count)
    assert done.returncode == 2
    assert done.stderr == "error: the value 7 is odd.\n"


def test_interrupt_is_130(tmp_path):
    done = run(tmp_path, "interrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_defect_keeps_its_traceback(tmp_path):
    assert "Traceback" in run(tmp_path, "defect").stderr


def test_success_is_silent(tmp_path):
    done = run(tmp_path, "nothing")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_options_and_overrides_in_any_order():
    parser = tool_argument_parser("x", eval_only=True)
    line = ["train.a=1", "--config-file", "c.py", "b=2", "--eval-only", "--num-gpus", "2", "+c=-1"]
    args = parse_tool_arguments(parser, line)
    assert args.opts == ["train.a=1", "b=2", "+c=-1"]
    assert args.eval_only
    assert args.num_gpus == 2


def test_negative_yaml_values():
    parser = tool_argument_parser("x")
    args = parse_tool_arguments(parser, ["--config-file", "c.yaml", "SEED", "-1"])
    assert args.opts == ["SEED", "-1"]
