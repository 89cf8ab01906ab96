"""A headless Chromium driven through its own pipe: the DevTools protocol without a library."""

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Page:
    """One page: sends commands, keeps what the console and the log said."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._buffer, self._last, self._session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []

    def start(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are noted."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._outgoing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, path: Path, *, width: int = 1440, height: int = 900, dark: bool = False, every: bool = True) -> None:
        """Load a file; returns when every figure is drawn, or without `every` as soon as the first one is."""
        self.problems.clear()
        self.requests.clear()
        self.resize(width, height)
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.send("Page.navigate", url=path.resolve().as_uri())
        drawn = "documentElement.dataset.drawn !== undefined" if every else "querySelector('[data-figure] svg')"
        self.wait_for(f"document.readyState === 'complete' && document.{drawn}")

    def show(self, figure: str) -> None:
        """Scroll to a figure; returns when it is drawn."""
        plot = f"document.getElementById('plot-{figure}')"
        self.evaluate(f"{plot}.scrollIntoView({{behavior: 'instant'}})")
        self.wait_for(f"{plot}.querySelector('svg .trace, svg .hm')")

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; raises where it throws."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 75.0) -> None:
        """Return when the condition holds; asked for inside the page, so that nothing spins here."""
        script = (
            f"new Promise((done, fail) => {{ const end = Date.now() + {seconds * 1000}; const ask = () => ({condition})"
            " ? done(true) : Date.now() > end ? fail(new Error('waited in vain')) : setTimeout(ask, 50); ask(); })"
        )
        for _ in range(3):
            try:
                self.evaluate(script)
            except RuntimeError as error:
                if "context" not in str(error).lower() and "navigat" not in str(error).lower():
                    raise
            else:
                return

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full, **self._clip(full))
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
        )

    def _clip(self, full: bool) -> dict[str, Any]:
        if not full:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _receive(self, seconds: float = 150.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._incoming], [], [], seconds)
            chunk = os.read(self._incoming, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("chromium does not answer")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        self._note(event)
        return event

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(params["exceptionDetails"])[:1000])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(params["args"])[:1000])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"][:200])
            case _:
                pass


@contextmanager
def browser(binary: str, profile: Path) -> Iterator[Page]:
    """A page of a new Chromium with an empty profile; ended when the block ends."""
    to_browser, ours_out = os.pipe()
    ours_in, from_browser = os.pipe()
    command = [binary, *FLAGS, f"--user-data-dir={profile}"]
    shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    page = Page(ours_in, ours_out)
    try:
        page.start()
        yield page
    finally:
        os.close(ours_out)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_in)
