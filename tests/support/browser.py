"""Drives a headless Chromium through its DevTools protocol, over a pair of pipes: no package is needed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
KEYS = {"Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "Tab": 9}
KEYS |= {f"Arrow{side}": code for side, code in zip(("Left", "Up", "Right", "Down"), range(37, 41), strict=True)}
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
OPTIONS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # nothing but this machine can be reached


class Browser:
    """Holds a browser with one page.

    Attributes:
        problems: Errors and warnings of the page's console so far, and its uncaught errors.
        requests: Addresses that the page has requested so far.
        downloads: Folder of the files that the page has saved.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.downloads = folder / "downloads"
        self._count, self._rest = 0, b""
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]  # beyond 3 and 4, where Chromium looks
        command = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", "chromium", *OPTIONS]
        log = (folder / "chromium.log").open("w")
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder / 'profile'}", "about:blank"], pass_fds=theirs, stdout=log, stderr=log
        )
        for end in (read, write, *theirs):
            os.close(end)
        self._session = None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict:
        """Calls a method of the DevTools protocol, and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 120
        while (answer := self._next(end)).get("id") != self._count:
            self._note(answer.get("method"), answer.get("params", {}))
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self, end: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "Chromium has ended, or does not answer"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: str | None, about: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(x.get("value", x.get("description"))) for x in about["args"]))
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Opens an address, and waits until the document and its scripts are loaded."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, after it is settled if it is a promise."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, (expression, self.problems, self.evaluate("document.body.innerText"))
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int, dark: bool = False, reduced_motion: bool = False) -> None:
        """Sets the size of the page and the user's preferences of colour scheme and motion."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        wishes = {"prefers-color-scheme": "dark" if dark else "light"}
        wishes["prefers-reduced-motion"] = "reduce" if reduced_motion else "no-preference"
        self.call("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in wishes.items()])

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> dict[str, float]:
        """Scrolls an element into view, and returns the place at these shares of its width and height."""
        return self.evaluate(
            f"(element => {{ element.scrollIntoView({{block: 'center', behavior: 'instant'}}); "
            f"const box = element.getBoundingClientRect(); "
            f"return {{x: box.x + {x} * box.width, y: box.y + {y} * box.height}}; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def move(self, selector: str, x: float = 0.5, y: float = 0.5) -> dict[str, float]:
        """Moves the mouse over an element, to these shares of its width and height."""
        place = self.point(selector, x, y)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Clicks an element with the mouse."""
        place = self.move(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses a key; modifiers as in DevTools: 1 Alt, 2 Control, 4 Meta, 8 Shift."""
        code = KEYS.get(key, ord(key[0].upper()))
        options = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **text, **options)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def drop(self, selector: str, *files: Path) -> None:
        """Drags files over an element and drops them there."""
        data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
        place = self.point(selector)
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **place)

    def choose(self, selector: str, *files: Path) -> None:
        """Chooses files in an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve()) for file in files])

    def accessible(self) -> list[tuple[str, str]]:
        """Returns role and name of everything that a screen reader sees."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Writes a picture of the page, or of its visible part, to a PNG."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
