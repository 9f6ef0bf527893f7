#!/usr/bin/env python
"""Pre-train, fine-tune and compare on a small data set made on the spot."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.studies.demo import main

if __name__ == "__main__":
    main()
