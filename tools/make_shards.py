#!/usr/bin/env python
"""Write images into tar shards with an index, for fast or remote storage."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.images.shards import main

if __name__ == "__main__":
    main()
