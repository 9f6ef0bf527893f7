#!/usr/bin/env python
"""Measure speed and memory on this machine, beside a reference."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.studies.benchmark.__main__ import main

if __name__ == "__main__":
    main()
