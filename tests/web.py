"""The page of `make web` in headless Chromium: its text equals that of ./sample, and it says what is wrong with a file.

    make web && python3 tests/web.py

Writes build/web/screenshot.png. Chromium is driven through its debugging port with Python's standard library alone.
"""

import base64
import functools
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

FOLDER = "build/web"
passed = failed = 0


def verdict(ok, text):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'}  {text}", flush=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Browser:
    """A page of headless Chromium. call() runs a command of its debugging protocol."""

    def __init__(self, program):
        self.folder, port = tempfile.mkdtemp(), free_port()
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "about:blank",
             f"--user-data-dir={self.folder}", f"--remote-debugging-port={port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
                address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
                break
            except (OSError, StopIteration):
                time.sleep(0.3)
        else:
            sys.exit("error: Chromium does not answer at its debugging port")
        host, path = address[len("ws://"):].split("/", 1)
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.socket.sendall((f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
                             "Sec-WebSocket-Version: 13\r\n\r\n").encode())
        self.file, self.count = self.socket.makefile("rb"), 0
        while self.file.readline().strip():
            pass

    def call(self, method, **params):
        self.count += 1
        data, mask = json.dumps({"id": self.count, "method": method, "params": params}).encode(), os.urandom(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self.socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            length = self.file.read(2)[1] & 127
            if length >= 126:
                length = int.from_bytes(self.file.read(2 if length == 126 else 8), "big")
            answer = json.loads(self.file.read(length))
            if answer.get("id") == self.count:
                return answer["result"]

    def open(self, url):
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        for _ in range(100):
            if self.run(f"location.href === {json.dumps(url)} && document.readyState === 'complete'"):
                return
            time.sleep(0.1)

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return result["result"].get("value")

    def close(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None or not os.path.exists(f"{FOLDER}/megalodon.wasm"):
        print(f"skipped: {'Chromium is missing' if program is None else 'make web has not been run'}\n0 passed, 0 failed")
        return
    handler = functools.partial(Quiet, directory=FOLDER)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = f"http://127.0.0.1:{server.server_port}/"
    with open(f"{FOLDER}/model.safetensors", "rb") as file, open(f"{FOLDER}/cut.safetensors", "wb") as cut:
        cut.write(file.read(100000))
    browser = Browser(program)
    try:
        browser.open(page)
        for temperature, seed in ((0, 1337), (1, 7), (0.8, 3)):
            expected = subprocess.run(["./sample", "--prompt", "ROMEO:\n", "--num-tokens", "300", "--temperature",
                                       str(temperature), "--seed", str(seed)], check=True, capture_output=True).stdout
            text = browser.run(f"ready.then(() => {{ $('temperature').value = {temperature}; $('seed').value = {seed};"
                               "return write(300) }).then((bytes) => Array.from(bytes))")
            verdict(text is not None and bytes(text) == expected,
                    f"300 bytes at temperature {temperature} are those of ./sample")
        verdict(browser.run("$('text').textContent") == expected.decode(), "  and they are on the page")
        verdict(browser.run("Math.abs(model.attention(0).reduce((a, b) => a + b) - 1) < 1e-5"),
                "the last query's probabilities sum to 1")
        browser.call("Emulation.setDeviceMetricsOverride", width=1180, height=1010, deviceScaleFactor=1, mobile=False)
        browser.run("show()")
        png = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
        with open(f"{FOLDER}/screenshot.png", "wb") as file:
            file.write(png)
        verdict(png[:4] == b"\x89PNG" and len(png) > 30000, f"{FOLDER}/screenshot.png shows a page")
        for model, word in (("cut.safetensors", "cut short"), ("none.safetensors", "404"), ("index.html", "safetensors")):
            browser.open(f"{page}?model={model}")
            message = browser.run("ready.catch(() => 0).then(() => $('error').textContent)") or ""
            verdict(word in message and not browser.run("$('error').hidden"), f"a model in {model}: {message}")
    finally:
        browser.close()
        server.shutdown()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
