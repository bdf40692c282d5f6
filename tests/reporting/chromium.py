"""Headless Chromium over its DevTools pipe: real clicks and keys on a page, without another dependency."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no chromium: apt install chromium"
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowRight": (39, ""), " ": (32, " ")}


class Browser:
    """One page of a running Chromium. What scripts do wrong, and whatever a page opens, is kept in ``events``."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        """Load a page and wait until its script has run through."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}; {self.complaints}"
            time.sleep(0.02)

    def point(self, selector: str, index: int = 0) -> tuple[float, float]:
        """Bring an element into the window and move the mouse to its middle."""
        x, y = self.run(
            f"(() => {{ const found = document.querySelectorAll({json.dumps(selector)})[{index}];"
            " found.scrollIntoView({ block: 'center', inline: 'center', behavior: 'instant' });"
            " const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str, index: int = 0) -> None:
        """Press and release the mouse in the middle of an element, wherever that is."""
        x, y = self.point(selector, index)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key."""
        code, text = _KEYS[name]
        common = {"key": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, label: str) -> None:
        """Choose an option of a select by the beginning of its text."""
        self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            f" found.value = [...found.options].find((one) => one.textContent.startsWith({json.dumps(label)})).value;"
            " found.dispatchEvent(new Event('change', { bubbles: true })); })()"
        )

    def texts(self, selector: str) -> list[str]:
        """Text of all elements, as a reader of the page sees it."""
        return self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.innerText.trim())"
        )

    def screenshot(self, path: Path) -> None:
        """Keep what the window shows."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, dialogs, blocked pieces and errors in the console."""
        wrong = (
            "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        )
        return [event for event in self.events if event.get("method") in wrong]

    @property
    def requests(self) -> list[str]:
        """Everything the page asked for."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], 60)[0], "chromium says nothing"
            piece = os.read(self._read, 1 << 20)
            assert piece, "chromium is gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of its own, with a profile that is thrown away."""
    assert BROWSER is not None, MISSING
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect() -> None:  # in the child: the protocol's pipe is file descriptors 3 and 4
        os.dup2(to_browser[0], 63)
        os.dup2(from_browser[1], 64)
        os.dup2(63, 3)
        os.dup2(64, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [BROWSER, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": profile},
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
            process.terminate()
            process.wait(timeout=20)
