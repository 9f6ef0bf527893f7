#!/usr/bin/env python
"""Draw what the tokens of encoders group."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.visualization.__main__ import main

if __name__ == "__main__":
    main()
