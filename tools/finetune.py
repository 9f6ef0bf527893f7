#!/usr/bin/env python
"""Train a detector on annotations of your own, and report how good it is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.detection.finetune import main

if __name__ == "__main__":
    main()
