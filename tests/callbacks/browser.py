"""A real Chromium without a screen, driven by its DevTools protocol (chromedevtools.github.io/devtools-protocol)."""

import asyncio
import base64
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-allow-origins=*")


def browser_command(port, profile):
    """How to start a browser here that listens at `port`; None where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return [found, *QUIET, f"--user-data-dir={profile}", f"--remote-debugging-port={port}", "about:blank"]
    if importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineWidgets"):
        return [sys.executable, str(Path(__file__).with_name("qt_chromium.py")), str(port)]
    return None


class Browser:
    """One page of one browser. Everything that it says or asks for after `open` is in `events`."""

    def __init__(self, command, port, profile):
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.profile = profile
        self.loop = asyncio.new_event_loop()
        self.events, self.number = [], 0
        self.session = self.loop.run_until_complete(self._session())
        self.socket = self.loop.run_until_complete(self.session.ws_connect(_address(port), max_msg_size=0))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    async def _session(self):
        return aiohttp.ClientSession()

    def call(self, method, **parameters):
        """Result of one command."""
        self.number += 1
        message = json.dumps({"id": self.number, "method": method, "params": parameters})
        self.loop.run_until_complete(self.socket.send_str(message))
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self):
        message = self.loop.run_until_complete(asyncio.wait_for(self.socket.receive_str(), 60))
        answer = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def open(self, path, *, width, scheme, height=900):
        """The file on a screen so wide, in a `dark` or `light` scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, script):
        """Value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path, *, full=False):
        """What is seen, or the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(shot["data"]))

    def said(self):
        """Everything that the page wrote to the console, errors included."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def requested(self):
        """Addresses that the page asked for, without what lies in the page itself."""
        asked = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        addresses = [event["params"]["request"]["url"] for event in asked]
        return [address for address in addresses if not address.startswith("data:")]

    def close(self):
        """Ends the browser."""
        self.loop.run_until_complete(self.socket.close())
        self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.profile, ignore_errors=True)


def start():
    """A browser, or None where there is none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    profile = tempfile.mkdtemp(prefix="casp-browser-")
    command = browser_command(port, profile)
    if command is None:
        shutil.rmtree(profile)
        return None
    return Browser(command, port, profile)


def _address(port):
    """Where the first page listens, once the browser is up."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
