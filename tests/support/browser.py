"""Drives a headless Chromium with its own protocol over two pipes: pages, keys, the mouse, screenshots, errors."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {
    "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32, "t": 84, "c": 67, "Tab": 9,
}  # fmt: skip
_PATIENCE_S = 60.0
_PIPES = (3, 4)


class Page:
    """One page. `errors` lists its console errors, exceptions, and attempts to load resources."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._read = to, back, b""
        self._count = 0
        self._session: str | None = None
        self.errors: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            part = os.read(self._back, 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(each.get("value", each)) for each in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if not url.startswith(("file:", "data:", "about:", "http://127.0.0.1")):
                self.errors.append(f"asked for {url}")

    def look(self, *, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        """Sets the size of the window and the reader's preferred colour scheme."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Loads a page and, if it is a report, waits until it is ready."""
        self._send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression; promises are awaited."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + _PATIENCE_S
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"the page never had {condition}; errors: {self.errors}"

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        code = {" ": "Space"}.get(key, key if len(key) > 1 else f"Key{key.upper()}")
        said = {"key": key, "code": code, "windowsVirtualKeyCode": _KEYS[key]}
        if len(key) == 1:
            said["text"] = key
        self._send("Input.dispatchKeyEvent", type="keyDown", **said)
        self._send("Input.dispatchKeyEvent", type="keyUp", **said)

    def click(self, selector: str) -> None:
        """Clicks on the centre of the first element that matches a selector."""
        self.drag(selector, 0.5, 0.5)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drags along an element, from and to given fractions of its width."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = f"(b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())"
        x, y, width, height = self.evaluate(box)
        first, last = ((x + share * width, y + 0.5 * height) for share in (start, end))
        for kind, (x, y) in (("mousePressed", first), ("mouseMoved", last), ("mouseReleased", last)):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Writes a PNG of the page."""
        data = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser_page(folder: Path) -> Iterator[Page]:
    """Yields a page of a headless Chromium with its profile in a folder; skips the test if no browser is installed."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    to_child, to = os.pipe()
    back, from_child = os.pipe()
    profile = f"--user-data-dir={folder}"

    def place_pipes() -> None:
        """Puts the pipes on descriptors 3 (commands) and 4 (answers). Copies first, in case they already use these."""
        copies = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (to_child, from_child)]
        for copy, place in zip(copies, _PIPES, strict=True):
            os.dup2(copy, place)

    started = subprocess.Popen(
        [program, *_FLAGS, profile],
        preexec_fn=place_pipes,
        pass_fds=_PIPES,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Page(to, back)
    finally:
        os.close(to)  # which ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(timeout=10)
        if started.poll() is None:
            started.kill()
            started.wait()
        os.close(back)
