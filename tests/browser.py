"""A headless Chromium for tests, driven by Selenium and chromedriver."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support import WAIT_S

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # the sandbox does not run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-back-forward-cache",  # which keeps the connections of a page that the browser has left
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """Shows pages, and runs scripts in them."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def show(self, server: Any, path: str = "/", scheme: str = "http") -> None:
        """Show a page of `server`, and wait until it has loaded."""
        self.driver.get(f"{scheme}://127.0.0.1:{server.server_address[1]}{path}")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page, with `arguments`. Returns what it returns."""
        return self.driver.execute_script(
            f"return (async function () {{ {script} }}).apply(null, arguments)", *arguments
        )

    def until(self, condition: str) -> None:
        """Wait until an expression holds in the page, or in the page that comes after it."""
        end = time.monotonic() + WAIT_S
        while not self.driver.execute_script(f"try {{ return Boolean({condition}) }} catch {{ return false }}"):
            assert time.monotonic() < end, f"{condition} did not hold within {WAIT_S} s"

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector)

    def complaints(self) -> list[str]:
        """Return the errors that the browser has reported in its console since the last call."""
        found = [each["message"] for each in self.driver.get_log("browser") if each["level"] == "SEVERE"]
        return [each for each in found if "/favicon.ico" not in each]  # which browsers ask for by themselves

    @contextlib.contextmanager
    def new_tab(self) -> Iterator[None]:
        """Show another tab during the block."""
        first = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        try:
            yield
        finally:
            self.driver.close()
            self.driver.switch_to.window(first)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Run a Chromium during the block, with an empty folder for its profile. Skips the test if there is none."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        missing = "Chromium" if program is None else "chromedriver"
        pytest.skip(f"there is no {missing} on PATH: install Debian's packages chromium and chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    options.accept_insecure_certs = True
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    driver = Chrome(options, ChromeService(driver_program, log_output=subprocess.DEVNULL))
    try:
        driver.set_script_timeout(WAIT_S)
        driver.set_page_load_timeout(WAIT_S)
        yield Browser(driver)
    finally:
        driver.quit()
