"""Video object segmentation on DAVIS 2017 by propagating labels between frozen tokens."""

from flsl_d2.evaluation.davis.measures import (
    Statistics,
    boundary_accuracy,
    region_similarity,
    statistics,
)
from flsl_d2.evaluation.davis.propagation import (
    Propagation,
    frame_size,
    propagate,
    propagate_through,
    segment_sequence,
)
from flsl_d2.evaluation.davis.run import (
    DavisRun,
    Results,
    Scores,
    evaluate_davis,
    run_davis,
    score_sequence,
)
from flsl_d2.evaluation.davis.sequences import (
    Sequence,
    davis_palette,
    find_sequence,
    read_indexed_png,
    sequence_names,
    write_indexed_png,
)

__all__ = [
    "DavisRun",
    "Propagation",
    "Results",
    "Scores",
    "Sequence",
    "Statistics",
    "boundary_accuracy",
    "davis_palette",
    "evaluate_davis",
    "find_sequence",
    "frame_size",
    "propagate",
    "propagate_through",
    "read_indexed_png",
    "region_similarity",
    "run_davis",
    "score_sequence",
    "segment_sequence",
    "sequence_names",
    "statistics",
    "write_indexed_png",
]
