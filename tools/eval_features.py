#!/usr/bin/env python
"""Measure an encoder's frozen tokens on any labelled data set."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.evaluation.__main__ import main

if __name__ == "__main__":
    main()
