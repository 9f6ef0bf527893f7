"""A trained detector in use: images in, detections in their own pixels out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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

import flsl_d2
from flsl_d2.detection.setup import read_kept_classes
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.images.reader import channels_of, read_channels, read_rgb
from flsl_d2.weights import FLSLCheckpointer
from flsl_d2.weights.checkpointer import BEST_WEIGHTS

# From which overlap two boxes of one class are the same object, as in SAHI (arXiv 2202.06934).
_SAME_OBJECT_IOU = 0.5
# Distance in pixels from an inner border of a slice within which a box ends at it.
_AT_BORDER = 2


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

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        """Return the objects of an index array or a mask of bools."""
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            classes=self.classes[chosen],
            masks=None if self.masks is None else self.masks[chosen],
        )

    @property
    def names(self) -> list[str]:
        """Name of each object's class, or its number as text."""
        known = self.class_names
        return [known[c] if c < len(known) else str(c) for c in self.classes.tolist()]

    def at_least(self, score: float) -> Detections:
        """Return the objects with this score or a higher one."""
        return self[self.scores >= score]

    def drawn_on(self, image: np.ndarray) -> np.ndarray:
        """Draw masks, boxes, names and scores.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            (H', W', 3) uint8 RGB; a small image is enlarged first.
        """
        from flsl_d2.visualization.detections import DrawnObjects, draw_objects

        masks: list[np.ndarray | None] = [None] * len(self)
        if self.masks is not None:
            masks = list(self.masks)
        objects = DrawnObjects(self.boxes, masks, self.classes.tolist(), self.scores.tolist())
        return draw_objects(np.ascontiguousarray(image), objects, list(self.class_names))

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
                "the package supervision is not installed; run pip install 'flsl-d2[formats]'."
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
        weights: detector weights; empty takes ``model_best.pth``, ``model_final.pth`` or the last
            checkpoint of the folder.
        device: ``cuda`` or ``cpu``; empty takes a GPU where there is one.
        score_threshold: detections with a lower score are left out.
        slice_side: side in pixels of the slices that larger images are cut into, for small objects
            in large pictures; 0 takes every image whole. The whole image is looked at as well.
        overlap: share of a slice's side that the next slice sees, too. It should be as large as
            the objects.
        short_side: pixels to resize the shorter side to; 0 takes the config's test size.
        batch_size: images or slices of a forward pass.

    Attributes:
        class_names: name of every class; empty where they are not known.
        category_ids: id of every class in the data set that the detector was trained on.

    Raises:
        InputError: no run, no weights, weights that do not cover the detector, or a run of another
            version whose model this one cannot build.
    """

    def __init__(
        self,
        model: str | Path,
        weights: str = "",
        device: str = "",
        score_threshold: float = 0.5,
        slice_side: int = 0,
        overlap: float = 0.2,
        short_side: int = 0,
        batch_size: int = 1,
    ) -> None:
        if not 0 <= overlap < 1:
            raise InputError(f"overlap is {overlap:g}; give a share of a slice, such as 0.2.")
        place = Path(model).expanduser()
        folder = place if place.is_dir() else None
        cfg = _folder_config(folder) if folder else _file_config(str(model))
        self.score_threshold, self.batch_size = score_threshold, max(batch_size, 1)
        self.slice_side, self.overlap = slice_side, overlap
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        file = weights or _folder_weights(folder, cfg)
        self.class_names, self.category_ids, version = _classes(folder, cfg)
        try:
            self.model = _detector(cfg, self.device)
            self.input_format, self.resize = _preprocessing(cfg, short_side)
        except InputError:
            raise
        except Exception as error:  # a config may name anything that this version lacks
            made_by = f" was made by flsl-d2 {version or 'of an unknown version'} and"
            raise InputError(
                f"'{model}'{made_by if folder else ''} describes a detector that flsl-d2 "
                f"{flsl_d2.__version__} cannot build ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}); install the version that it was made by."
            ) from error
        self.channels = channels_of(self.input_format)
        checkpointer = FLSLCheckpointer(self.model)
        checkpointer.require_whole = True
        checkpointer.resume_or_load(file, resume=False)
        self.model.eval()

    def __call__(
        self, images: np.ndarray | str | Path | Sequence[np.ndarray | str | Path]
    ) -> list[Detections]:
        """Detect objects in images.

        Args:
            images: one image or several, as files or as (H, W, 3) uint8 RGB arrays; any sizes.
                Files are turned upright by their EXIF orientation. A detector of C channels takes
                (H, W, C) arrays of the values that it was trained on.

        Returns:
            Detections of each image, in pixels of the upright image.

        Raises:
            InputError: a file that cannot be read, or an array that is no image.
        """
        several = [images] if isinstance(images, (np.ndarray, str, Path)) else list(images)
        found: list[Detections] = []
        for start in range(0, len(several), self.batch_size):
            pixels = [self.read(image) for image in several[start : start + self.batch_size]]
            if self.slice_side and any(max(p.shape[:2]) > self.slice_side for p in pixels):
                found += [self._in_slices(image) for image in pixels]
            else:
                found += [self._detections(each) for each in self._instances(pixels)]
        return found

    def read(self, image: np.ndarray | str | Path) -> np.ndarray:
        """Read an image file as the model takes it, upright; check an array.

        Returns:
            (H, W, 3) uint8 RGB, or (H, W, C) float32 for a detector of C channels.

        Raises:
            InputError: a file that cannot be read, or an array that is no image.
        """
        if not isinstance(image, np.ndarray):
            path = str(Path(image).expanduser())
            try:
                return read_channels(path, self.channels) if self.channels else read_rgb(path)
            except OSError as error:
                raise InputError(f"image '{image}' cannot be read ({error}); remove it.") from error
        if self.channels:
            if image.ndim != 3 or image.shape[2] != self.channels:
                raise InputError(
                    f"an image has the shape {image.shape}; give (H, W, {self.channels})."
                )
            return image.astype(np.float32)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"an image is {image.dtype} of shape {image.shape}; give uint8 RGB (H, W, 3)."
            )
        return image

    @torch.inference_mode()
    def _instances(self, images: Sequence[np.ndarray]) -> list[Instances]:
        inputs = []
        for pixels in images:
            ordered = pixels[..., ::-1] if self.input_format == "BGR" else pixels
            augmented = T.AugInput(np.ascontiguousarray(ordered))
            self.resize(augmented)
            tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
            height, width = pixels.shape[:2]
            inputs.append({"image": tensor, "height": height, "width": width})
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

    def _in_slices(self, image: np.ndarray) -> Detections:
        """Detect in the whole image and in overlapping slices; keep each object once."""
        height, width = image.shape[:2]
        if max(height, width) <= self.slice_side:
            return self._detections(self._instances([image])[0])
        side = self.slice_side
        corners = list(_corners(height, width, side, self.overlap))
        slices = [image[top : top + side, left : left + side] for top, left in corners]
        parts, cut = [self._detections(self._instances([image])[0])], []
        cut.append(np.zeros(len(parts[0]), bool))
        for start in range(0, len(slices), self.batch_size):
            batch = self._instances(slices[start : start + self.batch_size])
            for (top, left), found in zip(corners[start:], batch, strict=False):
                part = self._detections(found)
                size = slices[len(parts) - 1].shape[:2]
                cut.append(_ends_at_slice(part.boxes, (top, left), size, (height, width)))
                parts.append(_moved(part, top, left, size, (height, width)))
        masks = [part.masks for part in parts if part.masks is not None]
        together = Detections(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.classes for part in parts]),
            self.class_names,
            np.concatenate(masks) if masks else None,
        )
        return together[_once(together, np.concatenate(cut))]


def _corners(height: int, width: int, side: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Top and left of slices that cover the image; the last ones end at its border."""
    step = max(round(side * (1 - overlap)), 1)

    def starts(length: int) -> list[int]:
        last = max(length - side, 0)
        return sorted({*range(0, last, step), last})

    for top in starts(height):
        for left in starts(width):
            yield top, left


def _ends_at_slice(
    boxes: np.ndarray, corner: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> np.ndarray:
    """Whether each box of a slice ends at a border that is not the image's, so may be a part."""
    (top, left), (height, width) = corner, size
    ends = np.zeros(len(boxes), bool)
    if left:
        ends |= boxes[:, 0] < _AT_BORDER
    if top:
        ends |= boxes[:, 1] < _AT_BORDER
    if left + width < image[1]:
        ends |= boxes[:, 2] > width - _AT_BORDER
    if top + height < image[0]:
        ends |= boxes[:, 3] > height - _AT_BORDER
    return ends


def _moved(
    part: Detections, top: int, left: int, size: tuple[int, int], image: tuple[int, int]
) -> Detections:
    """Move the detections of a slice to their place in the image."""
    masks = None
    if part.masks is not None:
        masks = np.zeros((len(part), *image), dtype=bool)
        masks[:, top : top + size[0], left : left + size[1]] = part.masks
    shift = np.array([left, top, left, top], dtype=np.float32)
    return replace(part, boxes=part.boxes + shift, masks=masks)


def _once(found: Detections, cut: np.ndarray) -> np.ndarray:
    """Choose one detection of each object: non-maximum suppression by class.

    Boxes that end at a slice come after all others, and are left out where half of them lies in a
    box that is kept: they are parts of objects that another slice or the whole image shows.

    Returns:
        Indexes of the detections to keep, by falling score.
    """
    area = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], axis=1)
    kept: list[int] = []
    for index in np.lexsort((-found.scores, cut)).tolist():
        rivals = [k for k in kept if found.classes[k] == found.classes[index]]
        low = np.maximum(found.boxes[rivals, :2], found.boxes[index, :2])
        high = np.minimum(found.boxes[rivals, 2:], found.boxes[index, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        whole = area[index] if cut[index] else area[rivals] + area[index] - shared
        if not (shared > _SAME_OBJECT_IOU * whole).any():
            kept.append(index)
    return np.array(sorted(kept, key=lambda k: -found.scores[k]), dtype=int)


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
    candidates = [folder / BEST_WEIGHTS, folder / "model_final.pth"]
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
    own = T.ResizeShortestEdge([short_side] * 2, math.ceil(short_side * 1333 / 800))
    if isinstance(cfg, CfgNode):
        order = cfg.INPUT.FORMAT
        resize = [T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)]
    else:
        order = OmegaConf.select(cfg, "model.input_format", default="BGR")
        resize = list(instantiate(cfg.dataloader.test.mapper.augmentations))
    return order, T.AugmentationList([own] if short_side else resize)


def _classes(folder: Path | None, cfg: DictConfig | CfgNode) -> tuple[list[str], list[int], str]:
    """Names and ids of the classes and the version that a run kept; else of its data set."""
    if folder is not None:
        kept = read_kept_classes(folder)
        if kept is not None:
            return kept
    if isinstance(cfg, CfgNode):
        given: Any = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
    else:
        given = OmegaConf.select(cfg, "dataloader.test.dataset.names") or OmegaConf.select(
            cfg, "dataloader.train.dataset.names"
        )
    first = given if isinstance(given, str) else next(iter(given or []), "")
    metadata = MetadataCatalog.get(first) if first else None
    names = list(metadata.get("thing_classes", [])) if metadata else []
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {}) if metadata else {}
    return names, sorted(ids, key=lambda id_: ids[id_]), ""
