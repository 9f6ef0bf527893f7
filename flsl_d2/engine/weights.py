"""Which weights a detection run starts from, said in the log."""

from __future__ import annotations

import logging

from detectron2.engine import TrainerBase

from flsl_d2.checkpoint import FLSLCheckpointer
from flsl_d2.errors import InputError

__all__ = ["load_for_evaluation", "resume_or_start"]

logger = logging.getLogger(__name__)


def resume_or_start(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, trainer: TrainerBase
) -> int:
    """Load the last checkpoint with the state of training, or the starting weights alone.

    Args:
        checkpointer: of the run, with its trainer.
        weights: path or URL; empty for random weights.
        resume: prefer the last checkpoint in the output folder.
        trainer: its ``iter`` is set by loading.

    Returns:
        The step to start from.
    """
    found = resume and checkpointer.has_checkpoint()
    if weights or found:
        checkpointer.resume_or_load(weights, resume=resume)
    if found:
        # The checkpoint holds the number of the step that had just been done.
        logger.info("Resuming after step %d.", trainer.iter + 1)
        return trainer.iter + 1
    if resume:
        logger.info("No checkpoint in %s to resume; starting anew.", checkpointer.save_dir)
    if not weights:
        logger.warning("No weights were given: starting from random ones.")
    return 0


def load_for_evaluation(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, key: str
) -> None:
    """Load what ``--eval-only`` evaluates.

    Args:
        checkpointer: of the model.
        weights: path or URL.
        resume: take the last checkpoint in the output folder instead.
        key: how the config's key for weights is written, for messages.

    Raises:
        InputError: there is nothing to evaluate, or only an encoder.
    """
    if not weights and not (resume and checkpointer.has_checkpoint()):
        raise InputError(
            f"--eval-only has no weights to evaluate; give {key}DETECTOR.pth, or --resume for the "
            "last checkpoint in the output folder."
        )
    checkpointer.resume_or_load(weights, resume=resume)
    if checkpointer.loaded_encoder_only:
        raise InputError(
            f"weights {weights!r} hold an encoder and no detector, so there is nothing to "
            "evaluate; train one first (without --eval-only)."
        )
