#!/usr/bin/env python
"""Fine-tune a detector on an FLSL encoder, and evaluate it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.detection.__main__ import main

if __name__ == "__main__":
    main()
