#!/usr/bin/env python
"""Pre-train a vision transformer with FLSL."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.__main__ import main

if __name__ == "__main__":
    main()
