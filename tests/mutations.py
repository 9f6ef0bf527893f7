#!/usr/bin/env python3
"""Change the code of the methods in one place at a time, and see whether their tests notice.

``python tests/mutations.py [--minutes N] [--anew]`` changes a copy of the checkout. A run goes on
where the one before stopped, by ``output/mutations.json``. A mutation runs its own tests only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = "tests/pretrain/test_golden_methods.py"
TASKS = "tests/pretrain/test_method_tasks.py"
CROPS = "tests/pretrain/test_multi_crop.py"
VALUES = "tests/configs/test_recipe_values.py"
METHODS = "tests/pretrain/test_methods.py"
# File, old text, new text, tests.
MUTATIONS = [
    ("dino", "1 - self.center_momentum)", "0.5)", f"{GOLDEN} -k dino"),
    ("dino", "/ self.student_temp", "/ 0.2", f"{GOLDEN} -k dino"),
    ("dino", "for s in range(len(student)) if s != t]", "for s in range(len(student))]", f"{GOLDEN} -k dino"),
    ("dino", "(teacher.float() - self.center)", "teacher.float()", f"{GOLDEN} -k dino"),
    ("dino", "            self.loss.update(teacher)\n", "", f"{GOLDEN} -k dino"),
    ("ibot", "[0.0, random.uniform(*self.mask_share)]", "[random.uniform(*self.mask_share)]", f"{GOLDEN} -k ibot"),
    ("ibot", "self.patch_loss.update(teacher_patches)", "self.patch_loss.update(teacher_patches[masked])", f"{GOLDEN} -k ibot"),
    ("ibot", "masked_tokens(images, mask)", "masked_tokens(images, ~mask)", f"{GOLDEN} -k ibot"),
    ("ibot", "self.patch_weight * loss_patch", "loss_patch", f"{GOLDEN} -k ibot"),
    ("ibot", ".clamp(min=1) * len(mask)", ".clamp(min=1)", f"{GOLDEN} -k ibot"),
    ("masking", "math.log(0.3), -math.log(0.3)", "math.log(0.5), -math.log(0.5)", f"{GOLDEN} -k authors"),
    ("masking", "<= room", "<= side**2", f"{GOLDEN} -k authors"),
    ("masking", "min(16, most)", "min(4, most)", f"{GOLDEN} -k masks"),
    ("masking", 'self.backbone.embed(images, "none")', "self.backbone.embed(images)", f"{GOLDEN} -k ibot"),
    ("masking", "eps=1e-6", "eps=1e-3", f"{GOLDEN} -k mae"),
    ("masking", "self(full + self.positions(num_tokens, tokens.device))", "self(full)", f"{GOLDEN} -k mae"),
    ("mae", "dim=-1, keepdim=True)", "dim=-1, keepdim=True, unbiased=False)", f"{GOLDEN} -k mae"),
    ("mae", "if self.normalise_pixels", "if not self.normalise_pixels", f"{GOLDEN} -k mae"),
    ("beit", "codes[masked]", "codes.roll(1)[masked]", f"{GOLDEN} -k beit"),
    ("beit", "self.counts += counts", "self.counts += 1", f"{TASKS} -k codes"),
    ("maskfeat", "[[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]", "[[0.0, 0.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]", f"{GOLDEN} -k maskfeat"),
    ("maskfeat", 'mode="reflect"', 'mode="constant"', f"{GOLDEN} -k maskfeat"),
    ("maskfeat", "F.normalize(cells, dim=2)", "cells", f"{GOLDEN} -k maskfeat"),
    ("maskfeat", "atan2(columns, rows)", "atan2(rows, columns)", f"{GOLDEN} -k maskfeat"),
    ("simclr", '        head[-1].register_parameter("bias", None)\n', "", f"{GOLDEN} -k simclr"),
    ("base", "other, 1 - momentum)", "other, momentum)", f"{GOLDEN} -k moco"),
    ("base", "            self.teacher.eval()\n", "", f"{METHODS} -k teacher"),
    ("base", "module.train(mode)\n        return self", "module.eval()\n        return self", f"{GOLDEN} -k moco"),
    ("base", "for part in inputs.chunk(count)", "for part in [inputs]", f"{GOLDEN} -k moco"),
    ("base", "self.last_layers() if values.last_layer_frozen", "self.last_layers() if False", f"{METHODS} -k frozen"),
    ("base", "view.mean(dim=1) for view", "view[:, 0] for view", f"{GOLDEN} -k dino"),
    ("moco_v3", "keys[1]) + self._contrast(queries[1], keys[0])", "keys[0]) + self._contrast(queries[1], keys[1])", f"{GOLDEN} -k moco"),
    ("moco_v3", "2 * self.temperature * F", "F", f"{GOLDEN} -k moco"),
    ("moco_v3", "affine=False", "affine=True", f"{GOLDEN} -k moco"),
    ("moco_v3", "if freeze_patches and", "if False and", f"{GOLDEN} -k moco"),
    ("swav", "copy_(F.normalize(self.prototypes.weight, dim=1))", "copy_(self.prototypes.weight)", f"{GOLDEN} -k swav"),
    ("swav", "sinkhorn_epsilon=epsilon", "sinkhorn_epsilon=0.5", f"{GOLDEN} -k swav"),
    ("vicreg", ".relu().mean() / 2", ".relu().mean()", f"{GOLDEN} -k vicreg"),
    ("vicreg", "views_apart = True", "views_apart = False", f"{GOLDEN} -k vicreg"),
    ("vicreg", "self.loss(*pair, covariance_factor=0.5)", "self.loss(*pair)", f"{GOLDEN} -k vicregl"),
    ("vicreg", ".indices[:, :count].sort(dim=1).values", ".indices[:, :count]", f"{GOLDEN} -k vicregl"),
    ("places", "/ side * width", "/ side * width.abs()", f"{GOLDEN} -k vicregl"),
    ("densecl", "dense_outputs.mean(dim=1), dim=-1)", "dense_keys.mean(dim=1), dim=-1)", f"{GOLDEN} -k densecl"),
    ("densecl", "push(F.normalize(dense_outputs.mean(dim=1), dim=-1))", "push(dense_outputs.mean(dim=1))", f"{GOLDEN} -k densecl"),
    ("densecl", "F.normalize(key_tokens.float(), dim=-1).mT", "key_tokens.float().mT", f"{GOLDEN} -k densecl"),
    ("densecl", "(1 - self.dense_weight) * contrast + self.dense_weight * dense", "self.dense_weight * contrast + (1 - self.dense_weight) * dense", f"{GOLDEN} -k densecl"),
    ("detcon", "1 / areas", "0 * areas + 1.0", f"{TASKS} -k segments"),
    ("detcon", " / inside.sum(dim=-1, keepdim=True)", "", f"{GOLDEN} -k detcon"),
    ("selfpatch", "self.patch_weight * loss_patch", "loss_patch", f"{GOLDEN} -k selfpatch"),
    ("selfpatch", "if down or right]", "if down * right]", f"{GOLDEN} -k selfpatch"),
    ("selfpatch", "self.loss.update(everything)", "self.loss.update(torch.cat(teacher[:count]))", f"{GOLDEN} -k selfpatch"),
    ("selfpatch", "self.student.patch_head(self.student.norm(view))", "self.student.patch_head(view)", f"{GOLDEN} -k selfpatch"),
    ("droppos", "        with torch.no_grad():\n            sigma", "        if True:\n            sigma", f"{GOLDEN} -k droppos"),
    ("droppos", "* (1 - values.progress)", "* 1", f"{GOLDEN} -k droppos"),
    ("droppos", "/ self.attention_temp)", ")", f"{GOLDEN} -k droppos"),
    ("jigsaw", "tiles = (tiles - mean) /", "tiles = tiles /", f"{TASKS} -k jigsaw"),
    ("context", "drawn + (drawn >= 4)", "drawn", f"{TASKS} -k context"),
    ("rotation", "(2, 3)) for turns", "(3, 2)) for turns", f"{TASKS} -k rotation"),
    ("adclr", "self.query_weight * loss_query", "loss_query", "tests/pretrain/test_method_losses.py -k adclr"),
    ("pretrain/multi_crop.py", "[2] * num_local]", "[1] * num_local]", CROPS),
    ("pretrain/multi_crop.py", "solarise[kind]", "solarise[0]", CROPS),
    ("pretrain/views.py", "left, columns = left + columns, -columns", "left, columns = left, -columns", CROPS),
    ("pretrain/multi_crop.py", "labels[y][:, x]", "labels[x][:, y]", CROPS),
    ("flsl_d2/modeling/projection_head.py", "F.normalize(self.mlp(modes), dim=-1)", "self.mlp(modes)", f"{GOLDEN} -k dino"),
    ("flsl_d2/modeling/projection_head.py", "requires_grad=learn_scale", "requires_grad=False", f"{GOLDEN} -k dino"),
    ("configs/pretrain/dino_vit_small_p16_in1k.py", "blur=(1.0, 0.1, 0.5)", "blur=(0.1, 1.0, 0.5)", f"{VALUES} -k methods_recipe"),
    ("configs/pretrain/maskfeat_vit_small_p16_in1k.py", "mask_share=0.4", "mask_share=0.9", f"{VALUES} -k methods_recipe"),
    ("configs/pretrain/simclr_vit_small_p16_in1k.py", "temperature=0.1", "temperature=0.5", f"{VALUES} -k methods_recipe"),
    ("configs/pretrain/mae_vit_small_p16_in1k.py", "base_lr=1.5e-4", "base_lr=5e-4", f"{VALUES} -k methods_recipe"),
    ("configs/pretrain/ibot_vit_small_p16_in1k.py", "learn_scale=True", "learn_scale=False", f"{VALUES} -k methods_recipe"),
]  # fmt: skip


def caught(folder: Path, mutation: tuple[str, str, str, str]) -> bool:
    """Change a copy of the checkout, run the tests in a fork, and undo the change.

    ValueError where the old text is not there exactly once, or the tests do not run.
    """
    file, old, new, tests = mutation
    path = folder / (file if "/" in file else f"pretrain/methods/{file}.py")
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{path} has {text.count(old)} times {old!r}")
    path.write_text(text.replace(old, new))
    child = os.fork()
    if child == 0:
        import pytest

        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() != ROOT)]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"]
        os._exit(int(pytest.main([*options, *tests.split()])))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(text)
    if status not in (0, 1):
        raise ValueError(f"pytest ended with status {status} for {tests}")
    return status == 1


def main() -> None:
    """Run the mutations that have no result yet, and print those that no test caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1e6, help="time after which to stop")
    parser.add_argument("--anew", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    record, start = ROOT / "output/mutations.json", time.monotonic()
    record.parent.mkdir(exist_ok=True)
    results = json.loads(record.read_text()) if record.exists() and not arguments.anew else {}
    sys.dont_write_bytecode = True
    # What every fork would load otherwise.
    for library in ("detectron2.engine", "lightly.loss", "skimage.segmentation", "timm"):
        importlib.import_module(library)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("pretrain", "flsl_d2", "configs", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        for mutation in MUTATIONS:
            name = " | ".join(mutation[:3])
            if name in results:
                continue
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            results[name] = caught(Path(folder), mutation)
            record.write_text(json.dumps(results, indent=1))
    survivors = [name for name, found in results.items() if not found]
    print(f"{len(survivors)} survivors of {len(results)} mutations; there are {len(MUTATIONS)}")
    print("\n".join(f"survived: {name}" for name in survivors))


if __name__ == "__main__":
    main()
