"""A server in memory, ``flaky://``, that can be made to fail, to hang and to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyFileSystem(MemoryFileSystem):
    """Files in memory.

    Attributes:
        failures: number of the next files that cannot be read.
        hangs: number of the next requests that are answered after a second.
        requests: number of files and ranges that were read.
        limit: number of reads after which all others fail.
    """

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = hangs = requests = 0
    limit = float("inf")

    @classmethod
    def reset(cls, folder: Path) -> type[FlakyFileSystem]:
        """Serve the files of a folder as ``flaky://data``."""
        cls.store.clear()
        cls.failures = cls.hangs = cls.requests = 0
        cls.limit = float("inf")
        files = cls()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files.pipe_file(f"/data/{path.relative_to(folder)}", path.read_bytes())
        return cls

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        cls = type(self)
        if cls.hangs > 0:
            cls.hangs -= 1
            time.sleep(1)
        if cls.failures > 0 or cls.requests >= cls.limit:
            cls.failures -= 1
            raise ConnectionError("503, busy")
        cls.requests += 1
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
