"""The live page in a real browser: headless Chromium."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

import reqtable
from reqtable import Config, ControlOptions, StateRequestHandler, Transition, line, state, told
from reqtable.http import HTTPRequestHandler
from reqtable.run.operated import OPERATORS
from reqtable.server.operator import Operator
from tests.browser import Browser, browsing
from tests.service import Service
from tests.support import Client, served, serving, wait_until
from tests.test_control import Store, clients
from tests.test_page import TOKEN, Visitor, paged, port_in

ATTACK = "<img src=x onerror=document.title='run'><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, with an empty page. Afterwards it may not have complained, also not of the page's policy."""
    yield chromium
    chromium.driver.get("about:blank")
    chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert chromium.complaints() == []


@contextlib.contextmanager
def looked_at(browser: Browser, caplog: pytest.LogCaptureFixture, *handler: Any, **options: Any) -> Iterator[Any]:
    """Serve with a page, which the browser leaves before the server ends."""
    with paged(caplog, *handler, **options) as found:
        try:
            yield found
        finally:
            browser.driver.get("about:blank")


def show(browser: Browser, visitor: Visitor) -> None:
    """Show the page, once it has the server's figures."""
    browser.driver.get(f"http://{visitor.host}/")
    until_live(browser)


def until_live(browser: Browser) -> None:
    browser.until("document.body.dataset.status === 'live'")


def until_texts(browser: Browser, selector: str, expected: list[str]) -> None:
    found = f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)"
    browser.until(f"JSON.stringify({found}) === JSON.stringify({json.dumps(expected)})")


def resize(browser: Browser, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.until(f"innerWidth === {width}")


# -- what it shows ----------------------------------------------------------------------------------------------------


def test_counts_rows_and_the_machine(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog) as (server, visitor), clients(server, 4) as made:
        visitor.rows_once(4)
        show(browser, visitor)
        until_texts(browser, "#keys button", ["reading4"])
        assert browser.texts("#oldest td.id") == [str(row["id"]) for row in visitor.get("/v1/requests?sort=age")]
        assert browser.texts("#largest tbody td") == ["No request holds input or output."]
        assert browser.texts("#tiles .tile:first-child b") == ["4"]
        assert browser.texts("#machine .name") == ["command", "body"]

        made[0].ask(b"one\n")
        made[0].ask(b"two\n")
        made[1].send(b"put 12\none")
        until_texts(browser, "#machine .now", ["3", "1"])
        until_texts(browser, "#machine text.move.used", ["1", "2"])  # command to body, command to command
        until_texts(browser, "#largest td:last-child", ["3 B"])
        until_texts(browser, "#largest td.what span", ["Store · body"])
        browser.until("document.querySelector('#times .dim').textContent.startsWith('1 × ')")
        assert browser.run("return document.querySelectorAll('#times rect:not([height=\"0\"])').length") == 1

        made[2].hang_up()
        until_texts(browser, "#keys button", ["reading3"])
        until_texts(browser, "#endings tbody td:first-child", ["done"])
        until_texts(browser, "#endings tbody td:last-child", ["1"])
        assert browser.driver.title == "3 requests · reqtable"
        assert browser.texts("#workers td:nth-child(1)") == [str(os.getpid())]


def test_filters(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog) as (server, visitor), clients(server, 3) as made:
        made[1].send(b"put 12\none")
        while not (found := visitor.get("/v1/requests?handler_state=body")):
            pass  # the bytes have not arrived; pytest-timeout is the backstop
        body = [str(found[0]["id"])]
        show(browser, visitor)
        browser.until("document.querySelectorAll('#oldest td.id').length === 3")
        browser.find("body").send_keys("/")
        assert browser.run("return document.activeElement.name") == "peer"
        assert browser.run("return document.activeElement.value") == ""
        browser.driver.switch_to.active_element.send_keys(found[0]["peer"])
        until_texts(browser, "#oldest td.id", body)
        browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        browser.find("#filters [type=reset]").click()
        browser.until("document.querySelectorAll('#oldest td.id').length === 3")
        browser.find("[name=handler_state]").send_keys("body")
        until_texts(browser, "#oldest td.id", body)
        browser.find("#keys button").click()  # reading: all are
        until_texts(browser, "#keys [aria-pressed=true]", ["reading3"])
        browser.find("[name=older]").send_keys("1000")
        until_texts(browser, "#oldest tbody td", ["No request matches."])


def test_one_request(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog) as (server, visitor), clients(server, 2) as made:
        made[0].send(b"put 12\n\x1b[2Jone")
        show(browser, visitor)
        browser.until("document.querySelectorAll('#largest td.id button').length === 1")
        button = browser.find("#largest td.id button")
        id = int(button.text)
        button.send_keys(Keys.ENTER)
        browser.until("document.getElementById('detail').open")
        until_texts(browser, "#detail-title", [f"Request {id}"])
        until_texts(browser, "#detail-input", [r"\x1b[2Jone"])
        fields = dict(zip(browser.texts("#detail-fields dt"), browser.texts("#detail-fields dd"), strict=True))
        assert fields["key"] == "'put 12'"
        row = dict(zip(browser.texts("#detail-row dt"), browser.texts("#detail-row dd"), strict=True))
        assert (row["handler state"], row["waits for"]) == ("body", "exactly(n=12)")
        assert row["source"].startswith(__file__.replace("test_page_browser", "test_control"))
        browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        browser.until("!document.getElementById('detail').open")
        assert browser.run("return document.activeElement.textContent") == str(id)
        button.click()
        server.table.cancel(id)
        browser.until("document.getElementById('detail-error').textContent.includes('it has ended')")
        assert browser.run("return document.getElementById('cancel').hidden") is True
        browser.complaints()  # the browser notes each answer with the status 404


# -- what clients send ------------------------------------------------------------------------------------------------


class Kept(StateRequestHandler):
    """Keeps what a client sends."""

    last: str = ""

    @state(line())
    def command(self, item: bytes) -> Transition:
        self.last = item.decode().strip()
        self.send(b"ok\n")
        return self.command


class Silent(HTTPRequestHandler):
    """Answers nothing."""

    def do_GET(self) -> Transition:
        return self.waiting

    @state(told())
    def waiting(self, item: Any) -> Transition:
        return self.answer(200)


def test_markup_of_a_client_is_text(browser: Browser, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = Config(control=ControlOptions(page="127.0.0.1:0"))
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        caplog.set_level("INFO", "reqtable.control")
        server = stack.enter_context(serving(reqtable.UnixStreamServer(path, Kept, config=config)))
        visitor = Visitor(port_in(caplog))
        own = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"{ATTACK}\u202e{os.getpid()}"
        own.bind(f"\0{name}")
        own.connect(path)
        own.sendall(ATTACK.encode() + b"\n")
        assert own.recv(100) == b"ok\n"
        own.sendall(ATTACK.encode())
        wait_until(server, lambda: [len(each.input) for each in server.table] == [len(ATTACK)])
        show(browser, visitor)
        browser.find("#oldest td.id button").click()
        until_texts(browser, "#detail-input", [ATTACK])
        shown = dict(zip(browser.texts("#detail dt"), browser.texts("#detail dd"), strict=True))
        assert shown["last"] == repr(ATTACK)
        assert ATTACK in shown["peer"]
        assert browser.texts("#oldest td.peer") == [shown["peer"]]
        assert "\u202e" not in shown["peer"]
        assert browser.run("return [document.images.length, document.scripts.length]") == [0, 1]
        assert browser.driver.title == "1 request · reqtable"


def test_markup_in_a_path_is_text(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog, Silent) as (server, visitor), clients(server, 1) as [client]:
        target = "/<img/src=x/onerror=document.title='run'>"
        client.send(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(server, lambda: [each["path"] for each in server.table.snapshot()] == [target])
        show(browser, visitor)
        until_texts(browser, "#oldest td.what small", [f"GET {target}"])
        assert browser.run("return [document.images.length, document.title]") == [0, "1 request · reqtable"]


# -- who may use it ---------------------------------------------------------------------------------------------------


def test_a_page_of_another_origin_can_do_nothing(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog, token=TOKEN) as (server, visitor), clients(server, 1) as [client]:
        [row] = visitor.rows_once(1)
        with served(Blank) as other:
            browser.show(other)
            found = browser.run(
                """
                const [host, id, token] = arguments, tries = []
                const note = async promise => tries.push(await promise.then(answer => answer.type, () => "refused"))
                for (const path of ["/", "/v1/requests", "/v1/events"]) await note(fetch(`http://${host}${path}`))
                await note(fetch(`http://${host}/v1/requests`, {mode: "no-cors"}))
                const cancel = `http://${host}/v1/requests/${id}/cancel`
                await note(fetch(cancel, {method: "POST", headers: {Authorization: `Bearer ${token}`}}))
                await note(fetch(cancel, {method: "POST", mode: "no-cors", body: "{}"}))
                return tries""",
                *(visitor.host, row["id"], TOKEN),
            )
            assert found == ["refused"] * 6
            browser.run(
                """
                const frame = document.createElement("iframe")
                frame.src = `http://${arguments[0]}/`
                document.body.append(frame)
                await new Promise(done => frame.onload = done)""",
                visitor.host,
            )
            assert client.ask(b"still\n") == b"still\n"
            assert any("frame-ancestors" in each for each in browser.complaints())
        assert visitor.get("/v1/requests")[0]["id"] == row["id"]


class Blank(HTTPRequestHandler):
    def do_GET(self) -> Transition:
        return self.answer(200, "<!doctype html><body>", content_type="text/html")


def test_without_a_token_there_are_no_buttons(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog) as (server, visitor), clients(server, 1):
        visitor.rows_once(1)
        show(browser, visitor)
        browser.find("#oldest td.id button").click()
        browser.until("document.querySelectorAll('#detail-row dd').length > 5")
        assert browser.run("return ['operate', 'cancel'].map(id => document.getElementById(id).hidden)") == [True, True]
        assert (
            browser.run(
                "return [...document.querySelectorAll('#config td')].some(each => each.textContent === "
                "'limits.entries_max')"
            )
            is True
        )


def test_the_right_token_cancels_one_request_and_only_it(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog, token=TOKEN) as (server, visitor), clients(server, 3) as made:
        first, second, _ = visitor.rows_once(3)
        peers = {f"127.0.0.1:{each.socket.getsockname()[1]}": each for each in made}

        def cancel(id: int) -> None:
            buttons = browser.driver.find_elements("css selector", "#oldest td.id button")
            next(each for each in buttons if each.text == str(id)).click()
            browser.until("!document.getElementById('cancel').hidden")
            browser.find("#cancel").click()
            assert browser.texts("#cancel") == ["Cancel this request? Click again"]
            browser.find("#cancel").click()

        show(browser, visitor)
        browser.find("#token").send_keys("wrong\n")
        browser.until("document.querySelectorAll('#oldest td.id button').length === 3")
        cancel(first["id"])
        until_texts(browser, "#outcome", ["the token is wrong"])
        browser.until("document.getElementById('actions').hidden")
        assert ["401" in each for each in browser.complaints()] == [True]
        browser.find("#close").click()
        browser.find("#token").send_keys(f"{TOKEN}\n")
        cancel(first["id"])
        until_texts(browser, "#outcome", [f"request {first['id']} is cancelled"])
        assert peers.pop(first["peer"]).rest() == b""
        for each in peers.values():
            assert each.ask(b"still\n") == b"still\n"
        browser.until("document.getElementById('detail-error').textContent.includes('it has ended')")
        browser.find("#close").click()
        browser.find("[name=key]").send_keys("limits.entries_max")
        browser.find("[name=value]").send_keys("77\n")
        until_texts(browser, "#outcome", ["limits.entries_max is set, until the next reload"])
        browser.until("document.querySelector('.tile small').textContent === 'of at most 77'")
        assert visitor.get(f"/v1/requests/{second['id']}")["id"] == second["id"]
        assert all("404" in each for each in browser.complaints())


# -- how it behaves ---------------------------------------------------------------------------------------------------


def test_it_asks_once_a_second_and_not_while_it_is_hidden(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with looked_at(browser, caplog) as (_, visitor):
        show(browser, visitor)
        asked = "performance.getEntriesByType('resource').filter(each => each.name.endsWith('/v1/stats'))"
        browser.until(f"{asked}.length >= 3")
        starts = browser.run(f"return {asked}.map(each => each.startTime)")
        assert min(b - a for a, b in pairwise(starts)) >= 990
        fetched = browser.run("""
            let isHidden = true, count = 0, plain = fetch
            while (isLooking) await new Promise(done => setTimeout(done))
            window.fetch = (...given) => (count++, plain(...given))
            Object.defineProperty(document, "hidden", {get: () => isHidden})
            const change = () => document.dispatchEvent(new Event("visibilitychange"))
            change()
            await look()
            const whileHidden = count
            isHidden = false
            change()
            return [whileHidden, count > 0]""")
        assert fetched == [0, True]
        browser.find("#pause").click()
        browser.until("document.body.dataset.status === 'paused' && !isLooking")
        browser.find("#pause").click()
        until_live(browser)


def test_it_survives_a_restart(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    with paged(caplog) as (_, visitor):
        show(browser, visitor)
    browser.until("document.body.dataset.status === 'not connected'")
    assert browser.texts("#status") == ["not connected"]
    config = Config(control=ControlOptions(page=visitor.host))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)) as server:
        with Client(server.server_address):
            until_live(browser)
            until_texts(browser, "#keys button", ["reading1"])
            browser.driver.get("about:blank")
    assert all("ERR_" in each for each in browser.complaints())


def test_it_shows_how_far_a_restart_is(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    shown: dict[str, Any] = {
        "phase": "moving",
        "check": False,
        "pid": 12,
        "moved": 3250,
        "left": 1750,
        "ago_s": 1.0,
        "problem": None,
    }
    restart = SimpleNamespace(shown=lambda: shown, counts=Counter())
    caplog.set_level(logging.INFO, "reqtable.control")
    config = Config(control=ControlOptions(page="127.0.0.1:0"))
    server = reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)
    OPERATORS[server.engine] = operator = Operator(server.engine)
    with serving(server):
        show(browser, Visitor(port_in(caplog)))
        assert browser.run("return document.getElementById('restart').hidden")
        operator.restart = restart
        until_texts(browser, "#restart-text", ["3,250 of 5,000 requests moved to process 12"])
        assert browser.run("return document.getElementById('restart-bar').value") == 3250
        assert browser.run("return document.getElementById('restart-bar').max") == 5000
        shown |= {"phase": "failed", "problem": ATTACK}
        browser.until("document.getElementById('restart-bar').hidden")
        [text] = browser.texts("#restart-text")
        assert text == f"It failed 1.0 s ago, and the old process goes on: {ATTACK}"
        assert "run" not in browser.driver.title
        operator.restart = None
        taken = SimpleNamespace(taken=2, is_over=False, longest_freeze_s=0.031, began_at=server.engine.table.clock())
        operator.takers = [taken]
        browser.until("document.getElementById('restart-text').textContent.startsWith('2 requests taken over ')")
        browser.driver.get("about:blank")


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_scrolls_sideways(browser: Browser, caplog: pytest.LogCaptureFixture, width: int) -> None:
    with looked_at(browser, caplog, Silent, token=TOKEN) as (server, visitor), clients(server, 2) as made:
        path = "/" + "W" * 2000
        made[0].send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until(server, lambda: path in [each["path"] for each in server.table.snapshot()])
        show(browser, visitor)
        resize(browser, width)
        browser.until("document.querySelectorAll('#oldest td.id button').length === 2")
        scrolls = (
            "return ['html', '#detail'].map(name => document.querySelector(name)).map(each => "
            "each.scrollWidth - each.clientWidth)"
        )
        assert browser.run(scrolls) == [0, 0]
        browser.find("summary").click()
        browser.run("for (const each of document.querySelectorAll('#oldest button')) each.click()")
        browser.until("document.querySelectorAll('#detail-row dd').length > 5")
        assert browser.run(scrolls) == [0, 0]
        assert browser.run("return document.querySelector('#machine').clientWidth > 200")


CONTRAST = """
    const probe = document.body.appendChild(document.createElement("i"))
    const light = name => {
      probe.style.color = `var(--${name})`
      const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).map(each => each / 255)
      const [r, g, b] = parts.map(each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4)
      return .2126 * r + .7152 * g + .0722 * b
    }
    const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    const found = ["ink", "dim", "accent", "alarm", "good"].map(name => ratio(light(name), light("card")))
    return [light("back"), ...found]"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(browser: Browser, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    with looked_at(browser, caplog) as (_, visitor):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        show(browser, visitor)
        back, ink, *others = browser.run(CONTRAST)
        assert back < 0.05 if scheme == "dark" else back > 0.8
        assert ink >= 7  # WCAG 2, level AAA; 4.5 is level AA
        assert min(others) >= 4.5


def test_it_shows_all_workers(browser: Browser, tmp_path: Path) -> None:
    config = tmp_path / "reqtable.toml"
    config.write_text('[control]\npage = "127.0.0.1:0"\n')
    with Service("--config", str(config), workers=2, handler="tests/stuck.py:Stuck") as service:
        service.wait_for("2 of 2 workers are ready")
        [found] = service.wait_for(r"control: listening on 127\.0\.0\.1:(\d+)")
        visitor = Visitor(int(found[1]))
        with contextlib.ExitStack() as stack:
            while len({row["worker"] for row in visitor.get("/v1/requests")}) < 2:
                stack.enter_context(Client(service.address)).ask(b"hello\n")
            rows = visitor.get("/v1/requests")
            show(browser, visitor)
            until_texts(browser, "#keys button", [f"reading{len(rows)}"])
            assert {*browser.texts("#workers td:first-child")} == {str(pid) for pid in service.workers()}
            assert sum(map(int, browser.texts("#workers td:nth-child(4)"))) == len(rows)
            assert browser.texts("#machine .now") == [str(len(rows))]
            browser.find("#oldest td.id button").click()
            browser.until("document.querySelectorAll('#detail-row dd').length > 5")
        browser.driver.get("about:blank")
