"""COCO 2017, shorter side 480 to 800 in training and 800 in evaluation, longest side 1333.

Two overrides choose other files in COCO format, which set the model's number of classes:
``dataloader.train.dataset.json_file=FILE dataloader.train.dataset.image_root=FOLDER``, and the same
for ``dataloader.test``. Registered names work as well: ``dataloader.train.dataset.names=NAME
dataloader.test.dataset.names=NAME model.roi_heads.num_classes=NUMBER``.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
)
from omegaconf import OmegaConf

from flsl_d2.annotations.datasets import detection_records
from flsl_d2.annotations.mapper import FLSLDatasetMapper
from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator

dataloader = OmegaConf.create(
    dict(
        train=L(build_detection_train_loader)(
            dataset=L(detection_records)(
                # A name or a list of names; instead of a name, the files in COCO format.
                names="coco_2017_train",
                json_file="",
                image_root="",
                # Leave out images without objects; false trains on them as background.
                filter_empty=True,
            ),
            mapper=L(FLSLDatasetMapper)(
                is_train=True,
                augmentations=[
                    L(T.ResizeShortestEdge)(
                        short_edge_length=list(range(480, 801, 32)),
                        max_size=1333,
                        sample_style="choice",
                    ),
                    L(T.RandomFlip)(horizontal=True),
                ],
                image_format="${model.input_format}",
                use_instance_mask=True,
                # Compute boxes from the masks, for crops that cut objects.
                recompute_boxes=False,
            ),
            # Number of images in a step, of all processes.
            total_batch_size=16,
            # Number of decoding processes of a training process; 0 decodes in the training process.
            num_workers=4,
        ),
        test=L(build_detection_test_loader)(
            dataset=L(detection_records)(
                # A name or a list of names, each evaluated by itself.
                names="coco_2017_val",
                json_file="",
                image_root="",
                filter_empty=False,
            ),
            mapper=L(FLSLDatasetMapper)(
                is_train=False,
                augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
                image_format="${model.input_format}",
            ),
            num_workers=4,
        ),
        evaluator=L(FLSLCOCOEvaluator)(
            dataset_name="${dataloader.test.dataset.names}",
            output_dir="${train.output_dir}/inference",
        ),
    ),
    flags={"allow_objects": True},
)
