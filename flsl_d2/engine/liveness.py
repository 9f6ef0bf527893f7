"""Signs of life between the processes of a run, so that none waits long for one that is gone.

A launcher that does not end a run when one process fails (``srun``, pods of Kubernetes) would leave
the others waiting for the timeout of the process group, half an hour. So a thread of each process
writes to the store in which the processes found each other, and reads what the others wrote.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from flsl_d2.engine.stopping import STOP_SIGNALS

_PERIOD_SECONDS = 3.0
# A process whose thread is silent for so long is stopped, swapped out or cut off.
_SILENT_SECONDS = 120.0
# Time to end by itself that a process has after another one has failed.
_GRACE_SECONDS = 15.0


class SignsOfLife:
    """Thread that tells other processes of this one, and ends it when one of them has failed.

    A request to stop that a single process got is passed on to all. A process that gives no sign
    for ``silent_seconds`` counts as lost.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, silent_seconds: float = _SILENT_SECONDS
    ) -> None:
        # A connection of its own, with a short timeout: others wait in theirs.
        clone = getattr(store, "clone", None)
        own: Any = clone() if clone else store
        own.set_timeout(timedelta(seconds=10))
        self._store = PrefixStore("signs_of_life", own)
        self.rank, self.world_size, self.silent_seconds = rank, world_size, silent_seconds
        self._seen = dict.fromkeys(range(world_size), (b"", time.monotonic()))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        with suppress(RuntimeError):  # where the store is gone, so are the others
            self._store.set("failed", f"rank {self.rank} failed: {reason}")

    def end(self) -> None:
        """End the thread; no process expects a sign of this one from now on."""
        with suppress(RuntimeError):
            self._store.set(f"rank{self.rank}", "left")
        self._ended.set()

    def _run(self) -> None:
        count, reached = 0, time.monotonic()
        while not self._ended.wait(_PERIOD_SECONDS):
            count += 1
            try:
                reason = self._exchange(str(count))
                reached = time.monotonic()
            except RuntimeError as error:
                reason = ""
                if time.monotonic() - reached > self.silent_seconds:
                    reason = f"the store of the processes is silent ({error})"
            if reason and not self._ended.wait(_GRACE_SECONDS):
                print(f"error: {reason}; rank {self.rank} ends.", file=sys.stderr, flush=True)
                os._exit(1)

    def _exchange(self, sign: str) -> str:
        """Write a sign and read those of the others; return why this process has to end."""
        self._store.set(f"rank{self.rank}", sign)
        if self._store.check(["failed"]):
            return self._store.get("failed").decode()
        self._pass_on_stop()
        # Rank 0 watches all others, and rank 1 watches rank 0.
        watched = range(1, self.world_size) if self.rank == 0 else [0] if self.rank == 1 else []
        now = time.monotonic()
        for rank in watched:
            key = f"rank{rank}"
            found = self._store.get(key) if self._store.check([key]) else b""
            if found != self._seen[rank][0] or found == b"left":
                self._seen[rank] = (found, now)
            elif now - self._seen[rank][1] > self.silent_seconds:
                reason = f"rank {rank} has given no sign of life for {self.silent_seconds:.0f} s"
                self._store.set("failed", reason)
                return reason
        return ""

    def _pass_on_stop(self) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        request = getattr(handler, "__self__", None)  # a StopRequest while the run trains
        if request is None:
            return
        if request:
            self._store.set("stop", request.signal_name)
        elif self._store.check(["stop"]):
            number = signal.Signals[self._store.get("stop").decode()]
            os.kill(os.getpid(), number if number in STOP_SIGNALS else signal.SIGTERM)
