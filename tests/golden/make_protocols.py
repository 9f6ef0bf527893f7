"""Run the reference implementations of the dense protocols, and write their figures.

The checkouts are those of vpariza/open-hummingbird-eval (5e79da2), MkuuWaUjinga/leopart (7835701),
valeoai/LOST (fcedbec), YangtaoWANG95/TokenCut (fed52cd) and Junyi42/sd-dino (b85df18):

    python tests/golden/make_protocols.py --hummingbird DIR --leopart DIR --lost DIR \\
      --tokencut DIR --sd-dino DIR

It needs faiss-cpu, scikit-learn, scikit-image, joblib, torchvision and matplotlib. Modules that the
references import without using them here are empty.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
import protocol_inputs as made


def load(folder: Path, name: str, *absent: str, **contents) -> ModuleType:
    """Import a module of a checkout; ``absent`` modules are empty but for ``contents``."""
    for known in ("object_discovery", "datasets", "data", "utils", "experiments", "hbird"):
        for module in [m for m in sys.modules if m == known or m.startswith(f"{known}.")]:
            del sys.modules[module]
    for module in absent:
        sys.modules[module] = mock.MagicMock(**contents.get(module.replace(".", "_"), {}))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def hummingbird(folder: Path) -> dict[str, float]:
    """Mean IoU with the whole memory, and with a part of it drawn after seed 0."""
    lightning = {"LightningDataModule": object}
    module = load(folder, "hbird.hbird_eval", "pytorch_lightning", pytorch_lightning=lightning)

    class Neighbours:  # the reference's exact search is faiss on a GPU
        def __init__(self, memory, n_neighbors: int, **_) -> None:
            self.memory, self.k = memory, n_neighbors

        def find_nearest_neighbors(self, queries):
            found = (queries @ self.memory.T).topk(self.k, dim=1)
            return found.indices.numpy(), found.values.numpy()

    search = ModuleType("hbird.nn.search_faiss")
    search.NearestNeighborSearchFaiss = Neighbours
    sys.modules["hbird.nn.search_faiss"] = search
    scores = {}
    for name, memory_size in (("whole", None), ("drawn", 200)):
        loaders = []
        for seed, count in ((0, 10), (1, 6)):
            patches = made.blocks(seed, count)
            labels = torch.from_numpy(made.pixels(patches))[:, None].float() / 255
            loaders.append([(torch.from_numpy(made.tokens(patches, seed + 10)), labels)])
        loaders = [[(Images(x), y) for x, y in loader] for loader in loaders]
        torch.manual_seed(0)
        evaluator = module.HbirdEvaluation(
            Extractor(),
            loaders[0],
            num_classes=made.CLASSES,
            nn_method="faiss",
            memory_size=memory_size,
            dataset_size=10,
        )
        scores[name] = 100 * evaluator.evaluate(loaders[1], made.CELLS)
    return scores


class Extractor:
    """Encoder whose images are their tokens."""

    eval_spatial_resolution, d_model = made.CELLS, made.WIDTH

    def to(self, device: str) -> Extractor:
        return self

    def eval(self) -> None:
        """Do nothing."""

    def forward_features(self, images: Images) -> tuple[torch.Tensor, None]:
        return images.tokens, None


class Images:
    """Tokens in the place of images."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.shape = tokens, (len(tokens), 3, made.SIDE, made.SIDE)

    def to(self, device: str) -> Images:
        return self


def leopart(folder: Path) -> dict[str, float]:
    """Mean IoU of one cluster a class and of 30 clusters, of all tokens and of the foreground."""
    metric = type("Metric", (), {"__init__": lambda self, **_: None})
    metric.add_state = lambda self, name, value: setattr(self, name, value)
    absent = ("torchmetrics", "pytorch_lightning", "data.VOCdevkit.vocdata", "data.VOCdevkit")
    utils = load(folder, "experiments.utils", *absent, torchmetrics={"Metric": metric})
    scores = {}
    for part in ("all", "foreground"):
        patches = made.blocks(2, 40)
        tokens = made.tokens(patches, 12).reshape(-1, made.WIDTH)
        labels = torch.from_numpy(made.pixels(patches, 0 if part == "foreground" else 3))[:, None]
        masks = torch.nn.functional.interpolate(labels.float(), size=(100, 100), mode="nearest")
        inside = (patches.ravel() > 0) & (patches.ravel() < 255)
        mask = torch.from_numpy(inside.reshape(-1, 1, made.CELLS, made.CELLS)).float()
        counted = masks != 255
        if part == "foreground":
            tokens, counted = tokens[inside], counted & (masks != 0)
        points = utils.normalize_and_transform(torch.from_numpy(tokens.copy()), 50).numpy()
        for name, k in (("one", made.CLASSES - (part == "foreground")), ("many", 30)):
            values = []
            for seed in range(2):
                used = mask.clone() if part == "foreground" else None
                clusters = utils.cluster(50, points, made.CELLS, k, seed=seed, mask=used)
                clusters = torch.nn.functional.interpolate(
                    clusters.float(), size=(100, 100), mode="nearest"
                )
                measure = utils.PredsmIoU(k, made.CLASSES)
                measure.n_jobs = 1  # processes would not find the checkout
                measure.update(masks[counted], clusters[counted])
                many = name == "many"
                value = measure.compute(True, many_to_one=many, precision_based=many)[0]
                values.append(100 * value)
            scores[f"{part}_{name}"] = float(np.mean(values))
    return scores


def discovery(lost_folder: Path, tokencut_folder: Path) -> dict[str, list]:
    """Boxes of LOST and of TokenCut, of each scene."""
    boxes: dict[str, list] = {}
    lost = load(lost_folder, "object_discovery").lost
    cut = load(tokencut_folder, "object_discovery").ncut
    for name in ("lost", "tokencut"):
        boxes[name] = []
        for seed, rows, columns in made.SCENES:
            keys = torch.from_numpy(made.keys(seed, rows, columns))[None]
            grid, scales = [rows, columns], [made.PATCH, made.PATCH]
            size = (3, *made.image_size(rows, columns))
            if name == "lost":
                box = lost(keys, grid, scales, size)[0]
            else:
                keys = torch.cat([keys[:, :1], keys], dim=1)  # a class token, which is left out
                box = cut(keys, grid, scales, size, 0.2, 1e-5)[0]
            boxes[name].append(" ".join(str(int(value)) for value in box))
    return boxes


def sd_dino(folder: Path) -> dict[str, float]:
    """PCK@0.1 by point, by image and over the categories."""
    absent = ("extractor_dino", "extractor_sd", "loguru", "pandas", "utils.logger")
    module = load(folder, "pck_spair_pascal", *absent)
    settings = {"DINOV2": True, "ONLY_DINO": True, "FUSE_DINO": True, "MODEL_SIZE": "small"}
    settings |= dict.fromkeys(
        ("TEXT_INPUT", "CO_PCA_DINO", "DRAW_DENSE", "DRAW_SWAP", "MASK"), False
    )
    settings |= dict.fromkeys(("COUNT_INVIS", "EDGE_PAD", "PASCAL"), False)
    settings |= {"SEED": 0, "TOTAL_SAVE_RESULT": 0, "CO_PCA": True, "RAW": True}
    for name, value in settings.items():
        setattr(module, name, value)

    served: list[int] = []
    extractor = mock.MagicMock()
    extractor.model.patch_embed.patch_size = (14, 14)
    extractor.extract_descriptors = lambda *_: torch.from_numpy(made.spair_tokens(served.pop(0)))[
        None, None
    ]
    module.ViTExtractor = lambda *_, **__: extractor
    with tempfile.TemporaryDirectory() as root:
        names = made.write_spair(Path(root))
        for name in names:
            Image.new("RGB", (40, 30)).save(Path(root) / "JPEGImages" / name)
        points, images, categories = [], [], []
        for index, category in enumerate(("cat", "dog")):
            files, kps, thresholds = module.load_spair_data(root, 840, category)
            for first, last in [*((pair, pair + 1) for pair in range(5)), (0, 5)]:
                served[:] = range(10 * index + 2 * first, 10 * index + 2 * last)
                part = slice(2 * first, 2 * last)
                given = None, None, root, files[part], kps[part], category
                pck = module.compute_pck(*given, thresholds=thresholds[first:last])[0]
                (images if last == first + 1 else categories).append(float(pck))
            points += (kps[::2, :, 2] > 0).sum(dim=1).tolist()
    by_point = float(np.average(images, weights=points))
    scores = {"point": by_point, "image": np.mean(images), "category": np.mean(categories)}
    return {name: 100 * float(value) for name, value in scores.items()}


def main() -> None:
    """Write the figures of all references."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("hummingbird", "leopart", "lost", "tokencut", "sd-dino"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    default = Path(__file__).parent / "protocols.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    figures = {
        "hummingbird": hummingbird(args.hummingbird),
        "leopart": leopart(args.leopart),
        "discovery": discovery(args.lost, args.tokencut),
        "sd_dino": sd_dino(args.sd_dino),
    }
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
