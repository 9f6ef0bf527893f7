"""metrics.json of a run that is interrupted and resumed: each logged step once, none missing."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.engine import hooks

__all__ = ["PeriodicWriter", "trim_metrics"]


def trim_metrics(path: str | Path, num_steps: int) -> int:
    """Cut a metrics file off after the rows of the first ``num_steps`` steps.

    Rows beyond were logged after the checkpoint that a run goes on from, and will be logged again.
    A half-written row goes, too. The file is shortened in one operation.

    Returns:
        How many lines were cut off.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept, size = 0, 0
    for line in lines:
        try:
            # The iteration is that of the step which had just been done, counted from 0.
            whole = line.endswith(b"\n") and json.loads(line)["iteration"] < num_steps
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        kept, size = kept + 1, size + len(line)
    if kept < len(lines):
        with path.open("r+b") as file:
            file.truncate(size)
    return len(lines) - kept


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's, but a run that ends early leaves no row that a whole run would not have."""

    def after_train(self) -> None:
        """Write what is left of a finished run; only close the files of another."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
            return
        for writer in self._writers:
            writer.close()
