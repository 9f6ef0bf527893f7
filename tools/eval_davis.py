#!/usr/bin/env python
"""Segment the videos of DAVIS 2017 with an encoder's frozen tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.evaluation.davis.__main__ import main

if __name__ == "__main__":
    main()
