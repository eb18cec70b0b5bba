"""The site of the documentation in a real browser: headless Chromium, as wide as a phone, a tablet and a desk."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from reqtable.http import FileRequestHandler
from tests.browser import Browser, browsing
from tests.site import BUILD_S, ROOT, built_site
from tests.support import served

pytestmark = pytest.mark.timeout(BUILD_S + 60)  # the first test waits for the build
WIDTHS = (360, 800, 1440)
SHOWN = [
    "index",
    "how-to/index",
    *(f"reference/{name}" for name in ("configuration", "commands", "handlers", "states")),
]
PAGES = sorted(path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").glob("**/*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return built_site(tmp_path_factory, worker_id)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def shown(chromium: Browser, site: Path) -> Iterator[tuple[Browser, Any]]:
    """The browser, and the server of the site. Afterwards the browser may not have complained."""

    class Site(FileRequestHandler):
        root = str(site)

    with served(Site) as server:
        chromium.complaints()
        yield chromium, server
        assert chromium.complaints() == []
        chromium.run("localStorage.clear()")
        chromium.driver.get("about:blank")  # the server ends when its last connection does


def set_width(browser: Browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.until(f"innerWidth === {width}")


def set_scheme(browser: Browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def picture(browser: Browser, name: str) -> None:
    """Write what the browser shows to build/screenshots."""
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    made = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    (folder / f"{name}.png").write_bytes(base64.b64decode(made["data"]))


@pytest.mark.parametrize(
    # A page takes a second, so that all hundred pages take too long for each run.
    "page",
    [page if page in SHOWN else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
)
def test_a_page_fits_each_width_and_loads_nothing_from_elsewhere(shown: tuple[Browser, Any], page: str) -> None:
    browser, server = shown
    browser.show(server, f"/{page}.html")
    for width in WIDTHS:
        set_width(browser, width)
        wide = "document.documentElement.scrollWidth"
        assert browser.run(f"return {wide}") <= width, f"{page} is wider than {width} pixels"
        if page in SHOWN:
            picture(browser, f"{page.replace('/', '-')}-{width}")
    loaded = browser.run("return performance.getEntriesByType('resource').map(each => each.name)")
    assert len(loaded) > 2
    assert [each for each in loaded if not each.startswith("http://127.0.0.1:")] == []
    broken = "[...document.images].filter(each => each.complete && !each.naturalWidth).map(each => each.src)"
    assert browser.run(f"return {broken}") == []


def test_the_search_finds_a_key_and_a_name(shown: tuple[Browser, Any]) -> None:
    browser, server = shown
    set_width(browser, 1440)
    browser.show(server, "/index.html")
    for word, page in [("keepalive_s", "configuration.html"), ("skip_line", "wants.html")]:
        field = browser.find("input.md-search__input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(word)
        browser.until(
            f"[...document.querySelectorAll('.md-search-result__link')].some(e => e.href.includes({json.dumps(page)}))"
        )
    picture(browser, "search")


def test_the_colours_follow_the_system_and_the_switch(shown: tuple[Browser, Any]) -> None:
    browser, server = shown
    set_width(browser, 1440)

    def background() -> list[int]:
        return browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")

    set_scheme(browser, "dark")
    browser.show(server, "/reference/states.html")
    browser.until("document.body.dataset.mdColorScheme === 'slate'")
    assert max(background()[:3]) < 80
    browser.run("document.querySelector('figure.graph').scrollIntoView()")
    picture(browser, "states-dark")
    set_scheme(browser, "light")
    browser.until("document.body.dataset.mdColorScheme === 'default'")
    assert min(background()[:3]) > 200
    browser.run("document.querySelector('figure.graph').scrollIntoView()")
    picture(browser, "states-light")
    for _ in range(2):  # from the system's colours to light ones, and to dark ones
        browser.run(
            "[...document.querySelectorAll('label.md-header__button[for^=__palette]')].find(e => !e.hidden).click()"
        )
    browser.until("document.body.dataset.mdColorScheme === 'slate'")
    browser.driver.refresh()
    browser.until("document.body.dataset.mdColorScheme === 'slate'")
