#!/usr/bin/env python
"""Export an encoder or a whole detector to ONNX, PyTorch, timm, safetensors or Hugging Face."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.export.__main__ import main

if __name__ == "__main__":
    main()
