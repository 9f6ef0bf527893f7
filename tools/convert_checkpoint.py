#!/usr/bin/env python
"""Export an encoder's file: short for tools/export_model.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.export.convert import main

if __name__ == "__main__":
    main()
