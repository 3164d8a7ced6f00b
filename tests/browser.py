"""A headless Chromium, driven by the DevTools protocol over two pipes. It needs no package."""

import json
import os
import select
import shutil
import subprocess
import time
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)  # None: this machine has none
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Finds elements, also those inside of web components, which have a tree of their own.
EVERYWHERE = """
function everywhere(selector, root = document) {
  const inner = [...root.querySelectorAll("*")].filter(e => e.shadowRoot);
  return [...root.querySelectorAll(selector),
          ...inner.flatMap(e => everywhere(selector, e.shadowRoot))];
}
"""


class Browser:
    """One page. Use it in a `with` block. folder: for its files; it must be new."""

    def __init__(self, folder: str | os.PathLike):
        (theirs, self._commands), (self._answers, their_end) = os.pipe(), os.pipe()
        # Chromium reads commands from file 3 and writes answers to file 4.
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{their_end}'
        flags = (*FLAGS, f"--user-data-dir={folder}", "--window-size=1400,1800", "about:blank")
        self._process = subprocess.Popen(
            ["bash", "-c", script, PROGRAM, *flags],
            pass_fds=(theirs, their_end),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_end)
        self._left, self._number, self._session = b"", 0, {}
        try:
            self._attach()
        except BaseException:  # there will be no __exit__
            self.close()
            raise

    def _attach(self) -> None:
        (page,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = {
            "sessionId": self.call(
                "Target.attachToTarget", targetId=page["targetId"], flatten=True
            )["sessionId"]
        }

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params) -> dict[str, Any]:
        """Calls a method of the protocol and waits for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> bytes:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], 60)
            more = os.read(self._answers, 2**16) if ready else b""
            if not more:
                raise RuntimeError("The browser does not answer.")
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return message

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """The value of an expression of JavaScript, which may call `everywhere(selector)`."""
        script = f"(() => {{ {EVERYWHERE} return {script}; }})()"
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that are visible, in their order in the page."""
        script = f"everywhere({selector!r}).map(e => e.innerText.trim()).filter(t => t)"
        return self.value(script)

    def wait_for(self, selector: str, texts: list[str], seconds: float = 60) -> None:
        """Waits until the first texts are these."""
        end = time.monotonic() + seconds
        while (found := self.texts(selector))[: len(texts)] != texts:
            if time.monotonic() > end:
                raise AssertionError(f"The texts of {selector!r} are {found}, and not {texts}.")
            time.sleep(0.2)
