#!/usr/bin/env python
"""Convert an encoder of another project's weight file for this one, or for timm."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.weights.__main__ import main

if __name__ == "__main__":
    main()
