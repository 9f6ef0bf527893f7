"""docs/CONFIGS.md names every recipe, and no other."""

from __future__ import annotations

import re

from flsl_d2.engine.config_files import CONFIGS_FOLDER

TEXT = (CONFIGS_FOLDER.parent / "docs" / "CONFIGS.md").read_text()


def test_all_recipes_are_listed_and_all_listed_are_there():
    recipes = {
        str(path.relative_to(CONFIGS_FOLDER))
        for path in CONFIGS_FOLDER.rglob("*.py")
        if "common" not in path.parts
    }
    tables = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    listed = {
        name if "/" in name else f"pretrain/{name}"
        for name in re.findall(r"`([\w/]+\.py)`", tables)
    }
    assert listed == recipes
