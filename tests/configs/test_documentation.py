"""Documents, examples and headers of recipes name what the code has."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from recipes import FLSL, ONE_X, PRETRAINING, TEXTS, YAML, recipe

import flsl_d2_cli
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import CONFIGS_FOLDER
from flsl_d2.engine.run_folder import DETECTION_KEYS, PRETRAINING_KEYS, flat_config
from pretrain.schedules import set_run_length

ROOT = CONFIGS_FOLDER.parent
TEXT = (ROOT / "docs" / "CONFIGS.md").read_text()
OTHER_METHODS = [name for name in PRETRAINING if "/flsl" not in name]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
CHANGELOG = ROOT / "CHANGELOG.md"  # names what is gone, so only its links are tested
DOCUMENTS = [*GUIDES, *(ROOT / "docs" / "records").glob("*.md"), ROOT / "tests/golden/README.md"]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
EARLIER_KEYS = {"train.sharding"}  # of runs of earlier versions, which may be resumed
# What a run and its tools write, by names that look like keys of configs.
FILE_ENDINGS = (*".csv .html .json .md .npz .pkl .png .pth .py .safetensors .txt .yaml".split(),)


def test_all_recipes_are_listed_and_all_listed_are_there():
    tables = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    listed = re.findall(r"`(?!tools/)([\w/]+\.py)`", tables)
    assert {name if "/" in name else f"pretrain/{name}" for name in listed} == TEXTS.keys()


def test_the_keys_that_may_differ_are_those_of_the_engine():
    text = (CONFIGS_FOLDER.parent / "docs" / "RUNS.md").read_text()
    table = text.partition("**Keys that may differ**")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    for neutral, columns in ((PRETRAINING_KEYS, [1]), (DETECTION_KEYS, [2, 3])):
        listed = {key for row in rows for i in columns for key in re.findall(r"`([^`]+)`", row[i])}
        assert listed == {*neutral.no_effect, *neutral.on_resume} - EARLIER_KEYS
        first = {key for i in columns for key in re.findall(r"`([^`]+)`", rows[0][i])}
        assert first == set(neutral.no_effect)


def test_every_key_that_may_differ_is_a_key_of_a_recipe():
    pairs = (PRETRAINING_KEYS, _keys(FLSL)), (DETECTION_KEYS, _keys(ONE_X) | _keys(YAML))
    for neutral, keys in pairs:
        for pattern in {*neutral.no_effect, *neutral.on_resume} - EARLIER_KEYS:
            assert any(fnmatchcase(key, pattern) for key in keys), pattern


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _code(text: str) -> Iterator[str]:
    """Lines of fenced code with continued lines joined, then inline code."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@cache
def _help(tool: str, *benchmark: str) -> str:
    """Help of a tool, printed in this process."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [f"tools/{tool}.py", *benchmark, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    assert stopped.value.code == 0
    return printed.getvalue()


def _options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub("^#SBATCH.*", "", text)))


def _commands() -> Iterator[tuple[str, str, str]]:
    """Place, tool and arguments of every command in documents, recipes and examples of tools."""
    texts = {_name(path): list(_code(path.read_text())) for path in DOCUMENTS}
    for name, text in TEXTS.items():
        header = ast.get_docstring(ast.parse(text)) or ""
        texts[f"configs/{name}"] = header.replace("\\\n", " ").splitlines()
    for tool in TOOLS:
        texts[f"tools/{tool}.py --help"] = _help(tool).replace("\\\n", " ").splitlines()
    for place, lines in texts.items():
        for line in lines:
            found = re.search(r"(?<![\w/])tools/(\w+)\.py(.*)", line.partition(" #")[0])
            if found:
                yield place, found[1], found[2]


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("path", [*DOCUMENTS, CHANGELOG], ids=_name)
def test_relative_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_files_and_names_of_python_exist(path):
    text = path.read_text()
    folders = "flsl_d2|pretrain|tools|configs|tests|docs"
    for file in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./*-]*\w", text):
        assert list(ROOT.glob(file)), file
    for code in _code(text):
        for name in re.findall(r"(?<![\w./-])(?:flsl_d2|pretrain)(?:\.[A-Za-z_]\w*)+", code):
            if not name.endswith(FILE_ENDINGS) and ".my_" not in name:  # ".my_": an example's
                pkgutil.resolve_name(name)


def test_options_in_commands_are_those_of_the_tool():
    for place, tool, arguments in _commands():
        assert tool in TOOLS, (place, tool)
        benchmark = [arguments.split()[0]] if tool == "benchmark" and arguments.strip() else []
        benchmark = [word for word in benchmark if not word.startswith("-")]
        unknown = _options(arguments) - _options(_help(tool, *benchmark))
        assert not unknown, (place, tool, unknown)


def test_commands_are_accepted_by_their_tools(monkeypatch):
    """Every whole command of the guides is parsed; test_guide_commands.py runs them."""
    # Guides name devices that this machine may lack.
    monkeypatch.setattr("flsl_d2.engine.command_line.check_device", lambda name: None)
    accepted = 0
    for path in GUIDES:
        fenced = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.M | re.S)
        for line in "\n".join(fenced).replace("\\\n", " ").splitlines():
            command_line = r"(?:python tools/(\w+)\.py|^flsl-d2 ([\w-]+))(.*)"
            found = re.search(command_line, line.partition(" #")[0])
            if found is None or "..." in line or "$head" in line:
                continue
            tool, command, arguments = found.groups()
            source = (ROOT / f"tools/{tool}.py").read_text() if tool else ""
            module = re.search(r"from ([\w.]+) import main", source)
            name = flsl_d2_cli.COMMANDS[command][0] if command else module and module[1]
            if not name or name.endswith(("doctor", "detectron2")):  # without a shared parser
                continue
            loaded = importlib.import_module(name)
            monkeypatch.setattr(loaded, "run_tool", lambda *_: None)
            try:
                loaded.main(shlex.split(arguments))
            except SystemExit as stopped:
                pytest.fail(f"{path.name}: {line} ends with {stopped.code}")
            accepted += 1
    assert accepted >= 20


def test_overrides_in_commands_are_keys_of_the_named_config():
    for place, tool, arguments in _commands():
        configs = re.findall(r"configs/[\w/]+\.(?:py|yaml)", arguments)
        keys = re.findall(r"(?<!\S)([a-z_]+(?:\.\w+)+)=", arguments)
        if "records" in place or not configs or not keys:
            continue
        known = set().union(*(_keys(config.removeprefix("configs/")) for config in configs))
        assert set(keys) <= known, (place, tool, set(keys) - known)


@pytest.mark.parametrize("path", GUIDES, ids=_name)
def test_keys_in_the_text_are_keys_of_a_recipe(path):
    known = _keys(FLSL) | _keys(ONE_X) | _keys(YAML)
    if path.name == "METHODS.md":
        known = known.union(*map(_keys, OTHER_METHODS))
    roots = "dataset|views|dataloader|model|schedules|train|optimizer|lr_multiplier"
    roots += "|MODEL|DATASETS|SOLVER|TEST|INPUT|DATALOADER"
    for code in _code(path.read_text()):
        for key in re.findall(rf"(?<![\w./=-])(?:{roots})(?:\.[\w*]+)+(?!\w*[(:])", code):
            if not key.endswith(FILE_ENDINGS):
                assert any(fnmatchcase(name, key) for name in known), key


@cache
def _keys(config: str) -> frozenset[str]:
    """Every key of a config, those of whole nodes included."""
    cfg = load_yaml_config(config) if config.endswith(".yaml") else recipe(config)
    if config in PRETRAINING:
        set_run_length(cfg := copy.deepcopy(cfg), 1000)
    parts = (key.split(".") for key in flat_config(cfg))
    return frozenset(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
