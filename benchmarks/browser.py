"""A real TensorBoard and a headless Chromium to look at it with: for the documentation's pictures, and for tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.runs import ROOT

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = (
    "" if _CHROMIUM and _DRIVER else "chromium and chromedriver are not on PATH (Debian: chromium, chromium-driver)"
)
# Without a sandbox, which needs what root in a container does not have; with the projector's WebGL drawn by the CPU;
# and with nothing that Chromium would ask the network for on its own account.
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --enable-unsafe-swiftshader --hide-scrollbars --disable-quic"
    " --no-first-run --disable-background-networking --disable-component-update --disable-sync"
).split()
_SECONDS = 90.0  # longest wait for anything

# What is on the page in shadow roots is as much on the page as the rest.
_FIND = """
const found = [];
const walk = root => {
  found.push(...root.querySelectorAll(arguments[0]));
  for (const element of root.querySelectorAll('*')) if (element.shadowRoot) walk(element.shadowRoot);
};
walk(document);
return found;
"""
_TEXT = """
const words = [];
const walk = node => {
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) words.push(child.textContent.trim());
    if (child.nodeType !== Node.ELEMENT_NODE || getComputedStyle(child).display === 'none') continue;
    if (child.shadowRoot) walk(child.shadowRoot);
    walk(child);
  }
};
walk(document.body);
return words.filter(word => word);
"""


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, of which nothing stays. It logs its console and its requests."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(_CHROMIUM)
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(str(_DRIVER)))
        try:
            browser.set_page_load_timeout(_SECONDS)
            yield browser
        finally:
            browser.quit()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """The address of a TensorBoard over ``logdir``, in this checkout if relative, on a free port of the loopback."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield _address(server)
    finally:
        server.terminate()
        server.communicate()


def _address(server: subprocess.Popen[str]) -> str:
    said, late = "", Timer(_SECONDS, server.kill)
    late.start()
    try:
        for line in server.stderr or ():
            said += line
            if found := re.search(r"http://\S+", line):
                return found[0]
    finally:
        late.cancel()
    raise RuntimeError(f"TensorBoard did not start:\n{said}")


def open_page(browser: webdriver.Chrome, address: str) -> None:
    """Open an address anew, also where it differs from the last one only after the #."""
    browser.get("about:blank")
    browser.get(address)


def words(browser: webdriver.Chrome) -> list[str]:
    """The pieces of text on the page, in order."""
    return list(browser.execute_script(_TEXT))


def find(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    """All elements that match, wherever on the page they are."""
    return list(browser.execute_script(_FIND, selector))


def wait(browser: webdriver.Chrome, what: str, condition: Any) -> Any:
    """The first result of ``condition(browser)`` that is true.

    Raises:
        TimeoutException: there was none in time. The message has ``what`` and what was on the page instead.
    """
    try:
        return WebDriverWait(browser, _SECONDS).until(condition)
    except Exception as error:
        error.msg = f"{what} is not on the page; on it is: {' | '.join(words(browser))[:3000]}"  # type: ignore[attr-defined]
        raise


def wait_for_words(browser: webdriver.Chrome, *expected: str) -> None:
    """Wait until each of ``expected`` is one of the page's pieces of text."""
    wait(browser, f"one of {expected}", lambda browser: {*expected} <= {*words(browser)})


def requests(browser: webdriver.Chrome) -> list[str]:
    """The addresses that were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
