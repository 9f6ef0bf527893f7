#!/usr/bin/env python
"""Pre-train over a grid of settings and evaluate each teacher."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.studies.sweep import main

if __name__ == "__main__":
    main()
