#!/usr/bin/env python
"""Evaluate a list of encoders alike and put the results side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.studies.compare import main

if __name__ == "__main__":
    main()
