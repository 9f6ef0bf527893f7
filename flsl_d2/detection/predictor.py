"""A trained detector in use: images in, detections in their own pixels out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

import flsl_d2
from flsl_d2.detection.detections import Detections, MaskCrops
from flsl_d2.detection.model_folder import (
    build_detector,
    find_classes,
    find_config,
    find_weights,
    preprocessing,
)
from flsl_d2.errors import InputError
from flsl_d2.images.opening import MAX_PIXELS_LIMIT, printable
from flsl_d2.images.reader import channels_of, read_channels, read_rgb
from flsl_d2.weights import FLSLCheckpointer

# From which overlap two boxes of one class are the same object, as in SAHI (arXiv 2202.06934).
_SAME_OBJECT_IOU = 0.5
# Distance in pixels from an inner border of a slice within which a box ends at it.
_AT_BORDER = 2

Picture = np.ndarray | str | Path | Image.Image
"""A file, a URL, a picture of Pillow, or an (H, W, 3) uint8 RGB array."""


class Predictor:
    """A detector of a training run, or of a config with weights.

    Args:
        model: output folder of a training run, or a config file of either kind.
        weights: detector weights; empty takes ``model_best.pth``, ``model_final.pth`` or the last
            checkpoint of the folder.
        device: ``cuda`` or ``cpu``; empty takes a GPU where there is one.
        score_threshold: detections with a lower score are left out.
        slice_side: side in pixels of the slices that larger images are cut into, for small objects
            in large pictures, beside the whole image; 0 for none.
        overlap: share of a slice's side that the next one sees, too; as large as the objects.
        short_side: pixels to resize the shorter side to; 0 takes the config's test size.
        batch_size: images or slices of a forward pass.
        trust_config: use a folder's LazyConfig, which may run any code, in place of its
            ``model.json``.
        max_pixels: files of more pixels are refused.

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
        trust_config: bool = False,
        max_pixels: int = MAX_PIXELS_LIMIT,
    ) -> None:
        if not 0 <= overlap < 1:
            raise InputError(f"overlap is {overlap:g}; give a share of a slice, such as 0.2.")
        place = Path(model).expanduser()
        folder = place if place.is_dir() else None
        cfg = find_config(model, trust_config)
        self.max_pixels = max_pixels
        self.score_threshold, self.batch_size = score_threshold, max(batch_size, 1)
        self.slice_side, self.overlap = slice_side, overlap
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        file = weights or find_weights(folder, cfg)
        self.class_names, self.category_ids, version = find_classes(folder, cfg)
        try:
            self.model = build_detector(cfg, self.device)
            self.input_format, self.resize = preprocessing(cfg, short_side)
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

    def __call__(self, images: Picture | Sequence[Picture]) -> list[Detections]:
        """Detect objects in images of any sizes, in pixels of the upright image.

        Images are files, URLs, pictures of Pillow, or (H, W, 3) uint8 RGB arrays, and are turned
        upright by their EXIF orientation. A detector of C channels takes (H, W, C) arrays of the
        values that it was trained on.

        Raises:
            InputError: a file that cannot be read, or an array that is no image.
        """
        several = [images] if isinstance(images, Picture) else list(images)
        found: list[Detections] = []
        for start in range(0, len(several), self.batch_size):
            pixels = [self.read(image) for image in several[start : start + self.batch_size]]
            if self.slice_side and any(max(p.shape[:2]) > self.slice_side for p in pixels):
                found += [self._in_slices(image) for image in pixels]
            else:
                found += self._detect(pixels)
        return found

    def read(self, image: Picture) -> np.ndarray:
        """Read an image as (H, W, 3) uint8 RGB, or (H, W, C) float32 for C channels, upright."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            image = np.array(image if self.channels else image.convert("RGB"))
            image = image if image.ndim == 3 else image[..., None]
        if not isinstance(image, np.ndarray):
            return self._read_file(str(image))
        expected = self.channels or 3
        is_eight_bit = self.channels or image.dtype == np.uint8
        if image.ndim != 3 or image.shape[2] != expected or not is_eight_bit:
            kind = f"(H, W, {expected})" if self.channels else "uint8 RGB (H, W, 3)"
            raise InputError(f"an image is {image.dtype} of shape {image.shape}; give {kind}.")
        return image.astype(np.float32) if self.channels else image

    def _read_file(self, name: str) -> np.ndarray:
        path = Path(name).expanduser()
        if path.is_dir():
            raise InputError(
                f"'{printable(name)}' is a folder; give its files, such as "
                "flsl_d2.images.listing.find_images(folder), or use tools/predict.py."
            )
        try:
            local = PathManager.get_local_path(name) if "://" in name else str(path)
            if self.channels:
                return read_channels(local, self.channels, self.max_pixels)
            return read_rgb(local, self.max_pixels)
        except OSError as error:
            too_large = "more than max_pixels" in str(error)
            remedy = "max_pixels raises the limit" if too_large else "remove it"
            raise InputError(
                f"image '{printable(name)}' cannot be read ({error}); {remedy}."
            ) from error

    @torch.inference_mode()
    def _detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        inputs = []
        for pixels in images:
            ordered = pixels[..., ::-1] if self.input_format == "BGR" else pixels
            augmented = T.AugInput(np.ascontiguousarray(ordered))
            self.resize(augmented)
            tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
            height, width = pixels.shape[:2]
            inputs.append({"image": tensor, "height": height, "width": width})
        sizes = [image.shape[:2] for image in images]
        if getattr(type(self.model), "inference", None) is GeneralizedRCNN.inference:
            # Without Detectron2's last step, which makes a mask of the whole image of each object.
            model: Any = self.model
            outputs = model.inference(inputs, do_postprocess=False)
        else:
            outputs = [output["instances"] for output in self.model(inputs)]
        return [self._detections(out, size) for out, size in zip(outputs, sizes, strict=True)]

    def _detections(self, found: Instances, size: tuple[int, int]) -> Detections:
        found = found.to("cpu")
        found = found[found.scores >= self.score_threshold]
        found = found[found.scores.argsort(descending=True, stable=True)]
        predicted = found.pred_masks if found.has("pred_masks") else None
        is_small = predicted is not None and predicted.ndim == 4
        if is_small or found.image_size != size:
            if predicted is not None:
                found.remove("pred_masks")
            found.index = torch.arange(len(found))
            found = detector_postprocess(found, *size)
            predicted = predicted[found.index] if predicted is not None else None
        boxes, masks = found.pred_boxes.tensor, None
        if predicted is not None:
            masks = (
                MaskCrops.of_predictions(predicted, boxes, size)
                if is_small
                else MaskCrops.of_arrays(predicted.numpy().astype(bool))
            )
        return Detections(
            boxes.numpy().astype(np.float32),
            found.scores.numpy().astype(np.float32),
            found.pred_classes.numpy().astype(np.int64),
            self.class_names,
            masks,
        )

    def _in_slices(self, image: np.ndarray) -> Detections:
        """Detect in the whole image and in overlapping slices; keep each object once."""
        size, side = (image.shape[0], image.shape[1]), self.slice_side
        parts = self._detect([image])
        if max(size) <= side:
            return parts[0]
        cut = [np.zeros(len(parts[0]), bool)]
        places = list(corners(*size, side, self.overlap))
        for start in range(0, len(places), self.batch_size):
            batch = places[start : start + self.batch_size]
            slices = [image[top : top + side, left : left + side] for top, left in batch]
            for (top, left), piece, part in zip(batch, slices, self._detect(slices), strict=True):
                cut.append(ends_at_slice(part.boxes, (top, left), piece.shape[:2], size))
                masks = part.masks.moved(left, top, size) if part.masks is not None else None
                shift = np.array([left, top, left, top], dtype=np.float32)
                parts.append(replace(part, boxes=part.boxes + shift, masks=masks))
        crops = [crop for part in parts if part.masks is not None for crop in part.masks.crops]
        together = Detections(
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.classes for part in parts]),
            self.class_names,
            MaskCrops(crops, size) if parts[0].masks is not None else None,
        )
        return together[each_object_once(together, np.concatenate(cut))]


def corners(height: int, width: int, side: int, overlap: float) -> Iterable[tuple[int, int]]:
    """Top and left of slices that cover the image; the last ones end at its border."""
    step = max(round(side * (1 - overlap)), 1)
    lasts = [max(length - side, 0) for length in (height, width)]
    return itertools.product(*(sorted({*range(0, last, step), last}) for last in lasts))


def ends_at_slice(
    boxes: np.ndarray, corner: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> np.ndarray:
    """Whether each box of a slice ends at a border that is not the image's, so may be a part."""
    (top, left), (height, width) = corner, size
    inner = [left > 0, top > 0, left + width < image[1], top + height < image[0]]
    distance = np.abs(boxes - [0, 0, width, height])
    return ((distance < _AT_BORDER) & inner).any(axis=1)


def each_object_once(found: Detections, cut: np.ndarray) -> np.ndarray:
    """Choose one detection of each object: non-maximum suppression by class.

    Boxes that end at a slice (``cut``, (M,) bool) come after all others, and are left out where
    half of them lies in a box that is kept: they are parts of objects that another slice or the
    whole image shows. Returns the indexes of the detections to keep, by falling score.
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
