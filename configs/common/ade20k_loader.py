"""ADE20K's 150 classes: resized by 0.5 to 2.0 of 512, cropped to 512; evaluated whole, 512 high."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import SemSegEvaluator
from detectron2.projects.point_rend import ColorAugSSDTransform
from omegaconf import OmegaConf

from flsl_d2.annotations.mapper import FLSLDatasetMapper
from flsl_d2.images.labels import read_labels

dataloader = OmegaConf.create(
    dict(
        train=L(build_detection_train_loader)(
            # A name or a list of names.
            dataset=L(get_detection_dataset_dicts)(names="ade20k_sem_seg_train"),
            mapper=L(FLSLDatasetMapper)(
                is_train=True,
                augmentations=[
                    L(T.ResizeShortestEdge)(
                        short_edge_length=[512 * step // 10 for step in range(5, 21)],
                        max_size=4096,
                        sample_style="choice",
                    ),
                    # At most three quarters of a crop are of one class.
                    L(T.RandomCrop_CategoryAreaConstraint)(
                        crop_type="absolute",
                        crop_size=[512, 512],
                        single_category_max_area=0.75,
                        ignored_category=255,
                    ),
                    L(ColorAugSSDTransform)(img_format="RGB"),
                    L(T.RandomFlip)(horizontal=True),
                ],
                image_format="RGB",
            ),
            # Number of images in a step, of all processes.
            total_batch_size=16,
            # Number of decoding processes of a training process; 0 decodes in the training process.
            num_workers=4,
        ),
        test=L(build_detection_test_loader)(
            dataset=L(get_detection_dataset_dicts)(names="ade20k_sem_seg_val", filter_empty=False),
            mapper=L(FLSLDatasetMapper)(
                is_train=False,
                augmentations=[L(T.ResizeShortestEdge)(short_edge_length=512, max_size=2048)],
                image_format="RGB",
            ),
            num_workers=4,
        ),
        evaluator=L(SemSegEvaluator)(
            dataset_name="${dataloader.test.dataset.names}",
            output_dir="${train.output_dir}/inference",
            sem_seg_loading_fn=read_labels,
        ),
    ),
    flags={"allow_objects": True},
)
