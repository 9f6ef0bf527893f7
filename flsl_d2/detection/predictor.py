"""A trained detector in use: images in, detections in their own pixels out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_util
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchvision.ops import batched_nms

from flsl_d2.data.images import read_rgb
from flsl_d2.detection.setup import CLASSES_FILE
from flsl_d2.detection.yaml import load_yaml_config
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.weights import FLSLCheckpointer

__all__ = ["Detections", "Predictor"]

# Share of a tile that its neighbour sees, too, and from which overlap two boxes of one class are
# the same object: the defaults of the sliced inference of SAHI (arXiv 2202.06934).
_TILE_OVERLAP = 0.2
_SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Detections:
    """Objects of one image, by falling score.

    Attributes:
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels of the image.
        scores: (M,) float32 in [0, 1].
        classes: (M,) int64, class numbers from 0.
        class_names: name of every class; empty where they are not known.
        masks: (M, H, W) bool, None for a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: Sequence[str] = ()
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Name of each object's class, or its number as text."""
        known = self.class_names
        return [known[c] if c < len(known) else str(c) for c in self.classes.tolist()]

    def coco_results(self, image_id: int, category_ids: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Entries of a COCO results file.

        Args:
            image_id: number of the image.
            category_ids: id of each class; class numbers plus 1 where empty.
        """
        entries = []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            number = int(self.classes[index])
            entry: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category_ids[number] if category_ids else number + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(self.scores[index]),
            }
            if self.masks is not None:
                code = mask_util.encode(np.asfortranarray(self.masks[index], dtype=np.uint8))
                entry["segmentation"] = {**code, "counts": code["counts"].decode()}
            entries.append(entry)
        return entries

    def to_supervision(self) -> Any:
        """Convert to ``supervision.Detections``; needs the package ``supervision``."""
        try:
            import supervision
        except ImportError as error:
            raise InputError(
                "the package supervision is not installed; run pip install supervision."
            ) from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            mask=self.masks,
            data={"class_name": np.array(self.names)},
        )


class Predictor:
    """A detector of a training run, or of a config with weights.

    Args:
        model: output folder of a training run, or a config file of either kind.
        weights: detector weights; empty takes ``model_final.pth`` or the last checkpoint of the
            folder.
        device: ``cuda`` or ``cpu``; empty takes a GPU where there is one.
        score_threshold: detections with a lower score are left out.
        tile: side in pixels of the tiles that larger images are cut into, for small objects in
            large pictures; 0 takes every image whole.
        short_side: pixels to resize the shorter side to; 0 takes the config's test size.

    Raises:
        InputError: no run, no weights, or weights that do not cover the detector.
    """

    def __init__(
        self,
        model: str | Path,
        weights: str = "",
        device: str = "",
        score_threshold: float = 0.5,
        tile: int = 0,
        short_side: int = 0,
    ) -> None:
        place = Path(model).expanduser()
        folder = place if place.is_dir() else None
        cfg = _folder_config(folder) if folder else _file_config(str(model))
        self.score_threshold, self.tile = score_threshold, tile
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _detector(cfg, self.device)
        self.input_format, self.resize = _preprocessing(cfg, short_side)
        file = weights or _folder_weights(folder, cfg)
        checkpointer = FLSLCheckpointer(self.model)
        checkpointer.require_whole = True
        checkpointer.resume_or_load(file, resume=False)
        if checkpointer.loaded_encoder_only:
            raise InputError(f"weights '{file}' hold an encoder and no detector; train one first.")
        self.model.eval()
        self.class_names = _class_names(folder, cfg)

    def __call__(
        self, images: np.ndarray | str | Path | Sequence[np.ndarray | str | Path]
    ) -> list[Detections]:
        """Detect objects in images.

        Args:
            images: one image or several, as files or as (H, W, 3) uint8 RGB arrays; any sizes.
                Files are turned upright by their EXIF orientation.

        Returns:
            Detections of each image, in pixels of the upright image.

        Raises:
            InputError: a file that cannot be read, or an array that is no image.
        """
        several = [images] if isinstance(images, (np.ndarray, str, Path)) else list(images)
        if not several:
            return []
        pixels = [self.read(image) for image in several]
        if self.tile:
            return [self._in_tiles(image) for image in pixels]
        return [self._detections(found) for found in self._instances(pixels)]

    @staticmethod
    def read(image: np.ndarray | str | Path) -> np.ndarray:
        """Read an image file as (H, W, 3) uint8 RGB, upright; check an array.

        Raises:
            InputError: a file that cannot be read, or an array that is no image.
        """
        if not isinstance(image, np.ndarray):
            try:
                return read_rgb(str(Path(image).expanduser()))
            except OSError as error:
                raise InputError(f"image '{image}' cannot be read ({error}); remove it.") from error
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"an image is {image.dtype} of shape {image.shape}; give uint8 RGB (H, W, 3)."
            )
        return image

    @torch.inference_mode()
    def _instances(self, images: Sequence[np.ndarray]) -> list[Instances]:
        inputs = []
        for rgb in images:
            ordered = rgb[..., ::-1] if self.input_format == "BGR" else rgb
            augmented = T.AugInput(np.ascontiguousarray(ordered))
            self.resize(augmented)
            tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
            inputs.append({"image": tensor, "height": rgb.shape[0], "width": rgb.shape[1]})
        outputs = self.model(inputs)
        found = [output["instances"].to("cpu") for output in outputs]
        return [instances[instances.scores >= self.score_threshold] for instances in found]

    def _detections(self, found: Instances) -> Detections:
        order = found.scores.argsort(descending=True, stable=True)
        found = found[order]
        masks = found.pred_masks.numpy().astype(bool) if found.has("pred_masks") else None
        return Detections(
            found.pred_boxes.tensor.numpy().astype(np.float32),
            found.scores.numpy().astype(np.float32),
            found.pred_classes.numpy().astype(np.int64),
            self.class_names,
            masks,
        )

    def _in_tiles(self, image: np.ndarray) -> Detections:
        """Detect in overlapping tiles and keep one detection of an object seen in several."""
        height, width = image.shape[:2]
        parts = []
        for top, left in _corners(height, width, self.tile):
            tile = image[top : top + self.tile, left : left + self.tile]
            part = self._detections(self._instances([tile])[0])
            masks = None
            if part.masks is not None:
                masks = np.zeros((len(part), height, width), dtype=bool)
                masks[:, top : top + tile.shape[0], left : left + tile.shape[1]] = part.masks
            shift = np.array([left, top, left, top], dtype=np.float32)
            parts.append((part.boxes + shift, part.scores, part.classes, masks))
        boxes, scores, classes = (np.concatenate([part[i] for part in parts]) for i in range(3))
        kept = batched_nms(
            torch.from_numpy(boxes),
            torch.from_numpy(scores),
            torch.from_numpy(classes),
            _SAME_OBJECT_IOU,
        ).numpy()
        has_masks = parts[0][3] is not None
        masks = np.concatenate([part[3] for part in parts])[kept] if has_masks else None
        return Detections(boxes[kept], scores[kept], classes[kept], self.class_names, masks)


def _corners(height: int, width: int, tile: int) -> Iterator[tuple[int, int]]:
    """Top and left of tiles that cover the image; the last ones end at its border."""
    step = max(round(tile * (1 - _TILE_OVERLAP)), 1)

    def starts(length: int) -> list[int]:
        last = max(length - tile, 0)
        return sorted({*range(0, last, step), last})

    for top in starts(height):
        for left in starts(width):
            yield top, left


def _file_config(file: str) -> DictConfig | CfgNode:
    return load_yaml_config(file) if is_yaml(file) else load_lazy_config(file)


def _folder_config(folder: Path) -> DictConfig | CfgNode:
    """Read the ``config.yaml`` that a training run keeps in its folder."""
    file = folder / "config.yaml"
    try:
        text = file.read_text()
        if "\nMODEL:" in f"\n{text}":
            return load_yaml_config(str(file))
        cfg = LazyConfig.load(str(file))  # like any LazyConfig, it may name any function
    except FileNotFoundError as error:
        raise InputError(
            f"'{folder}' holds no config.yaml, so it is no output folder of tools/train_net.py; "
            "name one, or a config file with --weights."
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"'{file}' cannot be read ({error}); restore it.") from error
    if not isinstance(cfg, DictConfig) or "dataloader" not in cfg or "model" not in cfg:
        raise InputError(f"'{file}' describes no detector; name the folder of a training run.")
    return cfg


def _folder_weights(folder: Path | None, cfg: DictConfig | CfgNode) -> str:
    if folder is None:
        named = cfg.MODEL.WEIGHTS if isinstance(cfg, CfgNode) else cfg.train.init_checkpoint
        if not named:
            raise InputError("a config alone has no detector weights; give them with --weights.")
        return str(named)
    candidates = [folder / "model_final.pth"]
    last = folder / "last_checkpoint"
    if last.is_file():
        candidates.append(folder / last.read_text().strip())
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise InputError(f"'{folder}' holds no checkpoint yet; train first, or give --weights.")
    return str(found)


def _detector(cfg: DictConfig | CfgNode, device: str) -> nn.Module:
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        return build_model(cfg)
    return instantiate(cfg.model).to(device)


def _preprocessing(cfg: DictConfig | CfgNode, short_side: int) -> tuple[str, T.AugmentationList]:
    """Channel order of the model's input, and the resizing of its test data."""
    if isinstance(cfg, CfgNode):
        size = [short_side or cfg.INPUT.MIN_SIZE_TEST] * 2
        resize = [T.ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST)]
        return cfg.INPUT.FORMAT, T.AugmentationList(resize)
    order = OmegaConf.select(cfg, "model.input_format", default="BGR")
    if short_side:
        return order, T.AugmentationList([T.ResizeShortestEdge([short_side] * 2, 1333)])
    augmentations = instantiate(cfg.dataloader.test.mapper.augmentations)
    return order, T.AugmentationList(list(augmentations))


def _class_names(folder: Path | None, cfg: DictConfig | CfgNode) -> list[str]:
    """Names that the run kept, or those of the registered data set."""
    file = folder / CLASSES_FILE if folder else None
    if file is not None and file.is_file():
        return [str(name) for name in json.loads(file.read_text())]
    if isinstance(cfg, CfgNode):
        names: Any = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
    else:
        names = OmegaConf.select(cfg, "dataloader.test.dataset.names") or OmegaConf.select(
            cfg, "dataloader.train.dataset.names"
        )
    first = names if isinstance(names, str) else next(iter(names or []), "")
    return list(MetadataCatalog.get(first).get("thing_classes", [])) if first else []
