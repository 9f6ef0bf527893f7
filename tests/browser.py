"""A headless Chromium, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SWITCHES = """
    headless=new no-sandbox remote-debugging-pipe disable-gpu mute-audio disable-extensions
    disable-background-networking no-first-run no-proxy-server disable-component-update
    disable-dev-shm-usage renderer-process-limit=1
""".split()
# Every visible text whose contrast with what lies behind it is below 4.5.
CONTRAST = """
(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (c) => { const [r, g, b] = c.map((v) => {
    v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor);
    if (c.length === 3 || c[3] > 0.99) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const front = rgb(node instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(front), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([walker.currentNode.data.trim().slice(0, 30), ratio]);
  }
  return found;
})()
"""


class Browser:
    """A browser with one page at a time.

    Attributes:
        errors: messages of the console and exceptions of the page's scripts.
        requests: addresses that the page asked for, other than itself and data.
    """

    def __init__(self, profile: Path) -> None:
        to_child, ours_out = os.pipe()
        ours_in, from_child = os.pipe()
        # The browser reads descriptor 3 and writes 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in (to_child, from_child)]
        silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        piped = [
            (os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)
        ]
        switches = [f"--{switch}" for switch in (*SWITCHES, f"user-data-dir={profile}")]
        command = [CHROMIUM, *switches, "about:blank"]
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=silent + piped)
        for end in (*ends, to_child, from_child):
            os.close(end)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._in.read(1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> str:
        method, content = event.get("method", ""), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(content["exceptionDetails"])[:600])
        elif method == "Runtime.consoleAPICalled":
            if content["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(content["args"])[:300])
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(content["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = content["request"]["url"]
            if not url.startswith(("data:", "about:")) and url != self._address:
                self.requests.append(url)
        return method

    def open(self, page: Path, width: int = 1400, dark: bool = False) -> None:
        """Load a page, at a width of the window, in light or dark."""
        self.errors, self.requests = [], []
        self._address = page.resolve().as_uri()
        self.resize(width, dark)
        self.call("Page.navigate", url=self._address)
        while self._note(self._next()) != "Page.loadEventFired":
            pass

    def resize(self, width: int, dark: bool = False) -> None:
        """Give the window another width and colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """Evaluate an expression, awaiting a promise."""
        options = {"returnByValue": True, "awaitPromise": True}
        done = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true, at most 20 seconds."""
        code = (
            f"(async () => {{ for (let i = 0; i < 400; i++) {{ if ({condition}) return true; "
            "await new Promise((done) => setTimeout(done, 50)); } return false; })()"
        )
        assert self.run(code), condition

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        try:
            self.call("Browser.close")
        finally:
            self._out.close()
            self._in.close()
            os.waitpid(self._process, 0)
