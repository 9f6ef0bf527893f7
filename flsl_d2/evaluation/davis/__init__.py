"""Video object segmentation on DAVIS 2017 by propagating labels between frozen tokens."""
