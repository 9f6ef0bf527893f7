#!/usr/bin/env python3
"""Install Detectron2 into the environment of the Python that runs this file."""

import runpy
from pathlib import Path

# The file needs only the standard library, and the package may not be importable yet.
SCRIPT = Path(__file__).resolve().parents[1] / "flsl_d2" / "install_detectron2.py"

if __name__ == "__main__":
    runpy.run_path(str(SCRIPT), run_name="__main__")
