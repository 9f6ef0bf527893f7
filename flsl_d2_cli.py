"""One command for everything: ``flsl-d2 COMMAND``, which is also ``python -m flsl_d2 COMMAND``.

A command is the ``main`` of a module, which is imported when it is called: ``flsl-d2 --help``,
``recipes``, ``doctor`` and ``install-detectron2`` need neither PyTorch nor Detectron2.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

COMMANDS = {
    "doctor": ("flsl_d2.doctor", "check this machine and its environment"),
    "install-detectron2": ("flsl_d2.install_detectron2", "install Detectron2 here"),
    "recipes": ("", "list recipes and methods, or copy one to a file"),
    "pretrain": ("pretrain.__main__", "pre-train an encoder on images without labels"),
    "finetune": ("flsl_d2.detection.finetune", "train a detector on annotations of your own"),
    "train": ("flsl_d2.detection.__main__", "train or evaluate a detector by a recipe"),
    "predict": ("flsl_d2.detection.predict", "detect in images, folders and videos"),
    "export": ("flsl_d2.export.__main__", "write an encoder or a detector for other programs"),
    "visualize": ("flsl_d2.visualization.__main__", "draw what the tokens of encoders group"),
    "evaluate": ("flsl_d2.evaluation.__main__", "measure an encoder's frozen features"),
    "davis": ("flsl_d2.evaluation.davis.__main__", "segment videos with frozen features"),
    "compare": ("flsl_d2.studies.compare", "evaluate several encoders alike"),
    "sweep": ("pretrain.studies.sweep", "pre-train over a grid of settings"),
    "demo": ("pretrain.studies.demo", "go through everything on a small data set made here"),
    "benchmark": ("pretrain.studies.benchmark.__main__", "measure speed and memory"),
    "shards": ("flsl_d2.images.shards", "write images into tar files with an index"),
}
USAGE = "\n".join(
    [
        "usage: flsl-d2 COMMAND [options]      flsl-d2 COMMAND --help lists the options\n",
        *(f"  {name:20}{text}" for name, (_, text) in COMMANDS.items()),
    ]
)
RECIPES = """usage: flsl-d2 recipes [WORD ...]        list recipes whose name or title has all words
       flsl-d2 recipes --copy NAME FILE   write a config that starts from a recipe"""
_COPY = '''"""Starts from {name}: {title}"""

from flsl_d2.model_zoo import get_config

_recipe = get_config({name!r})
{keys}
# What is set here takes precedence, for example: train.max_iter = 1000
'''


def _fail(message: str, word: str = "", known: Iterable[str] = ()) -> int:
    close = difflib.get_close_matches(word, list(known), n=1)
    print(f"error: {message}{f'; did you mean {close[0]}?' if close else '.'}", file=sys.stderr)
    return 2


def _recipes() -> dict[str, tuple[Path, str]]:
    """File and title of each recipe, by name; in the wheel, or else in the checkout."""
    package = Path(importlib.util.find_spec("flsl_d2").origin).parent  # type: ignore
    shipped, found = package / "model_zoo" / "configs", {}
    folder = shipped if shipped.is_dir() else package.parent / "configs"
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml") and "common" not in path.parts:
            text = path.read_text(encoding="utf-8")
            text = text if path.suffix == ".yaml" else ast.get_docstring(ast.parse(text)) or ""
            title = text.strip("# \n").partition("\n")[0]
            found[path.relative_to(folder).as_posix()] = path, title
    return found


def recipes(arguments: list[str]) -> int:
    """List recipes, or copy one; return the exit status."""
    known = _recipes()
    if not arguments or not arguments[0].startswith("-"):
        for name, (_, title) in known.items():
            if all(word.lower() in f"{name} {title}".lower() for word in arguments):
                print(f"{name}\n    {title}")
        return 0
    if arguments[0] != "--copy" or len(arguments) != 3:
        print(RECIPES)
        return 0 if arguments[0] in ("-h", "--help") else 2
    name, target = arguments[1].removeprefix("configs/"), Path(arguments[2]).expanduser()
    if name not in known:
        return _fail(f"there is no recipe {name!r}", name, known)
    if target.exists() or target.suffix != Path(name).suffix:
        return _fail(f"{str(target)!r} exists or is no {Path(name).suffix}; name another file")
    text = known[name][0].read_text(encoding="utf-8")
    if target.suffix == ".py":
        assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        (names,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__")
        keys = "\n".join(f"{key} = _recipe.{key}" for key in ast.literal_eval(names))
        text = _COPY.format(name=name, title=known[name][1], keys=keys)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}; run it by --config-file {target}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command that a command line names; return the exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r} (flsl-d2 --help)", name, COMMANDS)
    if name == "recipes":
        return recipes(rest)
    sys.argv = [f"flsl-d2 {name}", *rest]
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("torch", "torchvision", "detectron2", "psutil"):
            raise
        return _fail(f"`flsl-d2 {name}` needs {missing}, which is missing; run `flsl-d2 doctor`")
    return module.main() or 0
