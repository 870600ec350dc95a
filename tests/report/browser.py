"""A headless Chromium, driven over a pair of pipes with its own protocol: no driver, no package.

The protocol: https://chromedevtools.github.io/devtools-protocol/; with --remote-debugging-pipe the
browser reads commands from descriptor 3 and writes answers and events to 4, each ended by a NUL.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-default-browser-check", "--hide-scrollbars", "--mute-audio",
)  # fmt: skip


class Browser:
    """One browser with one page.

    Attributes:
        requests: the address of everything that the page asked for.
        errors: what the page's console took for an error, and every exception of its script.
    """

    def __init__(self, folder: Path) -> None:
        program = next((path for name in _NAMES if (path := shutil.which(name))), None)
        if program is None:
            pytest.skip("no Chromium here (looked for " + ", ".join(_NAMES) + ")")
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._held, self._count = b"", 0
        self._process, self._to, self._from = _start([program, *_OPTIONS], folder)
        targets = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=targets["targetId"], flatten=True)
        self._session: str = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.page(f"{domain}.enable")

    def close(self) -> None:
        """End the browser, one way or another."""
        self.call("Browser.close")
        try:
            self._process.wait(PATIENCE_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of that size, with that theme of the system."""
        self.visit(path.as_uri(), width, height, dark)

    def visit(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a page in a window of that size, with that theme of the system."""
        self.page(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.page("Emulation.setEmulatedMedia", features=[theme])
        self.page("Page.navigate", url=url)
        scheme = json.dumps(url.partition(":")[0] + ":")
        self.wait_for(f"document.readyState === 'complete' && location.protocol === {scheme}")

    def evaluate(self, expression: str) -> Any:
        """The value of a script's expression."""
        found = self.page("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and let go of a key by name: Tab, ArrowRight, Enter."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            text = more if kind == "keyDown" else {}
            self.page(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **text,
            )

    def point(self, selector: str) -> None:
        """Bring an element into view and point at its middle."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        # What listens to scrolling has heard of it by the second frame.
        frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.page("Runtime.evaluate", expression=frames, awaitPromise=True)
        self.page("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        image = self.page("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def page(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to the page."""
        return self.call(method, self._session, **params)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command; its answer."""
        self._count += 1
        command: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        for message in self._messages():
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message['error']}"
                answer: dict[str, Any] = message["result"]
                return answer
            self._note(message)
        raise AssertionError(f"{method}: the browser has gone")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" in self._held:
                text, _, self._held = self._held.partition(b"\0")
                yield json.loads(text)
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            assert ready, f"the browser has been silent for {PATIENCE_S} s"
            block = os.read(self._from, 1 << 16)
            if not block:
                return
            self._held += block

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.errors.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])


def _start(command: list[str], folder: Path) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process, where to write to it and where to read from it."""
    with _pipe() as (its_in, to), _pipe() as (from_, its_out):
        # Numbers above 4, so that moving one to 3 does not close the other.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out)]
        script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        with open(folder / "browser.log", "wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", script, "bash", *command, f"--user-data-dir={folder / 'profile'}"],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"HOME": str(folder)},
            )
        for fd in ends:
            os.close(fd)
        return process, os.dup(to), os.dup(from_)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)
