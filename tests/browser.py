"""A headless Chromium, driven through its DevTools pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
# Nothing but the page itself may be loaded.
_SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()


class Browser:
    """One tab. `requests` are the addresses of everything that it has loaded or tried to."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest = send, receive, b""
        self._number, self._session = 0, ""
        self.requests: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._receive, 1 << 20)
            if not block:
                raise RuntimeError("Chromium has ended")
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(
        self, page: Path, width: int = 1280, height: int = 800, scheme: str = "light", script: bool = True
    ) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Emulation.setScriptExecutionDisabled", value=not script)
        self("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def click(self, selector: str, kind: str = "click") -> None:
        """kind: "click", or "hover" to only move there."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector({selector!r})"
                            ".getBoundingClientRect())")  # fmt: skip
        place = {"x": box[0], "y": box[1]}
        self("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for event in ("mousePressed", "mouseReleased") if kind == "click" else ():
            self("Input.dispatchMouseEvent", type=event, button="left", clickCount=1, **place)

    def screenshot(self, whole: bool = True, selector: str | None = None) -> Image.Image:
        """The whole page, what the window shows, or one element."""
        clip: dict[str, Any] = {}
        if selector is not None:
            box = self.evaluate(f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])"
                                f"(document.querySelector({selector!r}).getBoundingClientRect())")  # fmt: skip
            clip = {"clip": dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}}
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile; it ends with the context."""
    assert CHROMIUM is not None
    child_in, send = os.pipe()
    receive, child_out = os.pipe()
    command = 'exec "$0" "$@" 3<&' + str(child_in) + " 4>&" + str(child_out)
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(child_in)
    os.close(child_out)
    try:
        tab = Browser(send, receive)
        yield tab
        tab("Target.getTargets")
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(send)
        os.close(receive)
