"""The page of status in a real browser: Debian's chromium, driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serving import Served, receive_until

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium")

pytestmark = pytest.mark.skipif(
    DRIVER is None or BROWSER is None, reason="no browser: on Debian, install chromium and chromium-driver"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-quic",
        "--disable-sync",
        "--no-first-run",
        "--no-proxy-server",
        "--window-size=1200,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


def text(browser: Chrome, selector: str) -> str:
    """What is shown there: in one step, since the page replaces its elements every second."""
    found = browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
    assert isinstance(found, str)
    return found


def wait(browser: Chrome, condition: Callable[[], object]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: condition())


def test_the_page(browser: Chrome) -> None:
    """G9: it shows workers, requests and faults, goes on by itself, and what handlers have said stays text."""
    with Served("tests.gateway_apps:hostile_words", drain=0) as served:
        browser.get(f"{served.admin}/-/status")
        wait(browser, lambda: text(browser, "#state") == "ready")
        assert text(browser, "#faults") == "none"
        assert len(browser.find_elements(By.CSS_SELECTOR, "#pools tbody tr, #pools tr:has(td)")) == 2
        assert requests.get(f"{served.url}/", timeout=20).status_code == 500
        wait(browser, lambda: text(browser, "#errors") == "1")
        assert "raised" in text(browser, "#faults summary")
        browser.execute_script("document.querySelector('#faults summary').click()")
        wait(browser, lambda: "<img src=x onerror=" in text(browser, "#faults pre"))
        assert "in hostile_words" in text(browser, "#faults pre")
        with served.connect() as client:
            client.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            receive_until(client, b"\r\n\r\n")
            wait(browser, lambda: "1 busy, 1 idle" in text(browser, "#pools caption"))
            assert text(browser, "#active") == "1"
        wait(browser, lambda: "0 busy, 2 idle" in text(browser, "#pools caption"))
        assert browser.find_elements(By.CSS_SELECTOR, "#faults details[open]")
        assert browser.find_elements(By.CSS_SELECTOR, "#throughput rect.errors")
        assert browser.find_elements(By.CSS_SELECTOR, "#latency polyline.p99")
        assert text(browser, "#hour .chart span").startswith("/: requests a minute, ")
        assert browser.find_elements(By.CSS_SELECTOR, "#hour rect.errors")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#hour polyline")) == 2
        assert browser.title == "blastdoor"
        assert not browser.find_elements(By.CSS_SELECTOR, "#faults img")
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]  # no error of a script, nothing that the policy had to stop
    wait(browser, lambda: text(browser, "#state") == "not reachable")


def test_the_page_where_no_worker_is_ready(browser: Chrome) -> None:
    """G9, I10: it says that no worker is ready."""
    with Served("tests.gateway_apps:hostile_words", drain=0) as served:
        browser.get(f"{served.admin}/-/status")
        wait(browser, lambda: text(browser, "#state") == "ready")
        served.pool.close(drain=0)
        wait(browser, lambda: text(browser, "#state") == "no worker is ready")
