#!/usr/bin/env python
"""Detect objects in images, folders of images or videos, and draw them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.detection.predict import main

if __name__ == "__main__":
    main()
