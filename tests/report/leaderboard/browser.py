"""A headless Chromium driven through its debugging pipe, which needs no port and no package."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser():
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(file: Path, profile: Path, *, width=1200, height=900, mobile=False, address=""):
    """While active, a browser that shows the file and has no network; ``address`` goes behind the file's name."""
    program = find_browser()
    assert program, f"the page needs a browser: install one of {', '.join(NAMES)}"
    (commands_out, commands), (answers, answers_in) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    redirected = f'exec "$@" 3<&{commands_out} 4>&{answers_in}'  # where the browser looks for its pipe
    process = subprocess.Popen(
        ["bash", "-c", redirected, "bash", program, *options, "--remote-debugging-pipe"],
        pass_fds=(commands_out, answers_in),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        with os.fdopen(commands, "wb") as sending, os.fdopen(answers, "rb") as receiving:
            screen = {"width": width, "height": height, "mobile": mobile}
            yield Page(sending, receiving, f"{file.resolve().as_uri()}{address}", screen)
    finally:
        process.terminate()
        process.wait(30)


class Page:
    """One open page.

    Attributes:
        events: what the browser told while commands ran: exceptions, log entries, requests.
    """

    def __init__(self, sending, receiving, url, screen):
        self._sending, self._receiving, self._number, self._session = sending, receiving, 0, None
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, **screen)
        self.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.load(url)

    def load(self, url):
        """Open another page; what events told of the one before is forgotten."""
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()
        while self.run("document.readyState !== 'complete' || location.href === 'about:blank'"):
            pass

    def send(self, method, **params):
        """Run a command of the DevTools protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._sending.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode())
        self._sending.write(b"\0")
        self._sending.flush()
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        text = b""
        while (byte := self._receiving.read(1)) != b"\0":
            assert byte, "the browser ended"
            text += byte
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def choose(self, name, value):
        """Set a control as a user does."""
        self.run(
            f"(() => {{ const control = document.getElementById({json.dumps(name)});"
            f"control.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) control.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def click(self, selector):
        """Press the mouse in the middle of an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def press(self, key, code):
        """Press a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def text(self, selector):
        """The text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def is_shown(self, selector):
        """Whether an element can be seen."""
        return self.run(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def table(self):
        """The text of the rows by column."""
        return self.run(
            "(() => { const keys = [...document.querySelectorAll('#runs thead th:not(.run) button')]"
            ".map((one) => one.dataset.key);"
            "return [...document.querySelectorAll('#runs tbody tr.run')].map((row) => ({"
            "method: row.querySelector('.more').textContent, scheme: row.querySelector('.scheme').textContent,"
            "model: row.querySelector('.model').textContent,"
            "...Object.fromEntries(keys.map((key, place) => [key, row.cells[place + 1].textContent]))})); })()"
        )

    def trouble(self):
        """Exceptions, log entries, and requests for anything but the page."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [event for event in self.events if event["method"] in kinds]
        requests = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = {event["params"]["request"]["url"] for event in requests}
        return found + sorted(url for url in urls if "leaderboard.html" not in url and not url.startswith("data:"))

    def screenshot(self, file):
        """Write a picture of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)
        file.write_bytes(base64.b64decode(picture["data"]))
