"""Another implementation to compare with: a Python file that the user names.

The file is a program and is run; name only one that you trust. Of these functions it needs the one
that its benchmark calls:

- ``make_views(path)``: one image file to all its augmented views (``data``).
- ``make_step(batch_size, device, precision)``: a function of no arguments that takes one training
  step on a fixed batch of views, with everything that belongs to it (``pretrain-step``).
- ``make_run(files, batch_size, num_workers, device, precision)``: the same with its own data path
  from files (``end-to-end``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flsl_d2.errors import InputError

__all__ = ["reference_function"]


def reference_function(path: str, name: str) -> Callable[..., Any]:
    """Function ``name`` of the Python file ``path``.

    Raises:
        InputError: no such file, or no such function in it.
    """
    if not Path(path).is_file():
        raise InputError(f"--reference-module is '{path}', which is no file; give a Python file.")
    spec = importlib.util.spec_from_file_location("benchmark_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if function is None:
        raise InputError(
            f"--reference-module '{path}' has no function {name}; see "
            "tools/benchmark.py --help for what it needs."
        )
    return function
