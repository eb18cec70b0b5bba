"""Pages, downloads, forms, events and WebSockets in a real browser: headless Chromium."""

from __future__ import annotations

import gzip
import json
import logging
import os
import wave
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import flask
import pytest

import reqtable
from examples.events import Events
from examples.http_api import Notes
from examples.websocket_chat import Room
from reqtable import Transition
from reqtable.config import TLSOptions
from reqtable.http import HTTPRequestHandler, WebSocketHandler, wsgi_handler
from tests.browser import Browser, browsing
from tests.certificates import write_certificate
from tests.http_client import files_of
from tests.support import served, serving, wait_until
from tests.test_http_docs import defined


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, caplog: pytest.LogCaptureFixture) -> Iterator[Browser]:
    """The browser, with an empty page. Afterwards neither the server nor the browser may have complained."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, "reqtable.access")
    yield chromium
    chromium.driver.get("about:blank")
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert chromium.complaints() == []


@pytest.fixture
def asked(caplog: pytest.LogCaptureFixture) -> Any:
    """A function that returns the requests that were answered, as the access log has them, and forgets them."""

    def requests() -> list[dict[str, Any]]:
        found = [each.request for each in caplog.records if each.name == "reqtable.access.http"]  # type: ignore[attr-defined]
        caplog.clear()
        return [each for each in found if each["target"] != "/favicon.ico"]

    return requests


# -- a folder ---------------------------------------------------------------------------------------------------------

ATTACKS = (
    "<img src=x onerror=document.title='run'>.txt",
    "\"><script>document.title='run'<.txt",
    "javascript:void(document.title='run')&&a.txt",
)


def test_a_site_with_relative_links(browser: Browser, tmp_path: Path, asked: Any) -> None:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "sub" / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="style.css"><p id="text">ü</p>'
        '<img src="../a picture.svg"><script type="module" src="code.mjs"></script>'
    )
    (site / "sub" / "style.css").write_text("p { color: rgb(1, 2, 3) }")
    (site / "sub" / "code.mjs").write_text(
        "const found = await WebAssembly.instantiateStreaming(fetch('empty.wasm'))\n"
        "document.getElementById('text').textContent += (await (await fetch('data.json')).json()).text\n"
    )
    (site / "sub" / "empty.wasm").write_bytes(b"\0asm\1\0\0\0")
    (site / "sub" / "data.json").write_text('{"text": "öß"}')
    (site / "a picture.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="7" height="5"/>')
    with served(files_of(tmp_path, cache_seconds=0)) as server:
        browser.show(server, "/site/sub?query")
        browser.until("document.getElementById('text').textContent === 'üöß'")
        assert browser.driver.current_url.endswith("/site/sub/?query")
        assert browser.run("return getComputedStyle(document.getElementById('text')).color") == "rgb(1, 2, 3)"
        assert browser.run("return document.images[0].naturalWidth") == 7
        assert {each["status"] for each in asked()} == {200, 301}

        browser.driver.refresh()
        browser.until("document.getElementById('text').textContent === 'üöß'")
        again = asked()
        assert {each["target"].rpartition("/")[2] for each in again} == {
            *("?query", "style.css", "code.mjs", "data.json", "empty.wasm", "a%20picture.svg")
        }
        assert {each["status"] for each in again} == {304}
        assert sum(each["bytes_out"] for each in again) == 0

        data = site / "sub" / "data.json"
        data.write_text('{"text": "new"}')
        browser.driver.refresh()
        browser.until("document.getElementById('text').textContent === 'ünew'")
        assert [each["target"] for each in asked() if each["status"] == 200] == ["/site/sub/data.json"]


def test_a_listing_is_shown_and_clicked(browser: Browser, tmp_path: Path) -> None:
    names = ["plain.txt", "ü ä.txt", "a#b?c%41&amp;.txt", *ATTACKS]
    for name in names:
        (tmp_path / name).write_text(f"this is {name}")
    (tmp_path / "a <b> folder").mkdir()
    (tmp_path / "a <b> folder" / "inner.txt").write_text("inner")
    with served(files_of(tmp_path)) as server:
        browser.show(server)
        assert browser.driver.title == "Files in /"
        shown = browser.texts("th[scope=row] a")
        assert shown[0] == "a <b> folder/"
        assert sorted(shown[1:]) == sorted(names)
        assert browser.run("return [document.images.length, document.scripts.length]") == [0, 0]
        assert browser.run("return getComputedStyle(document.body).fontFamily").startswith("system-ui")
        for index, name in enumerate(shown[1:], start=2):
            browser.find(f"tr:nth-child({index}) a").click()
            browser.until(f"document.body.textContent === {json.dumps(f'this is {name}')}")
            browser.driver.back()
            browser.until("document.title === 'Files in /'")
        browser.find("tr:nth-child(1) a").click()
        browser.until("document.title === 'Files in /a <b> folder/'")
        assert browser.texts("th[scope=row] a") == ["inner.txt"]
        browser.find("p a").click()
        browser.until("document.title === 'Files in /'")
        assert browser.texts("th[scope=row] a") == shown


def brotli(data: bytes) -> bytes:
    """Return fewer than 64 KiB in the format of Brotli (RFC 7932), stored as they are."""
    return ((len(data) - 1) << 4 | 1 << 20).to_bytes(3, "little") + data + b"\x03"


def zstandard(data: bytes) -> bytes:
    """Return fewer than 256 bytes in the format of Zstandard (RFC 8878), stored as they are."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_compressed_files_are_decoded(browser: Browser, tmp_path: Path) -> None:
    for suffix, pack in ((".gz", gzip.compress), (".br", brotli), (".zst", zstandard)):
        (tmp_path / f"page{suffix}.txt").write_text("as it is")
        (tmp_path / f"page{suffix}.txt{suffix}").write_bytes(pack(f"from {suffix}".encode()))
    (tmp_path / "index.html").write_text("<!doctype html>")
    with served(files_of(tmp_path)) as server:
        browser.show(server)
        get = """
            const answer = await fetch(arguments[0])
            return [await answer.text(), answer.headers.get("content-encoding"), answer.headers.get("content-type")]"""
        for suffix, coding in ((".gz", "gzip"), (".br", "br"), (".zst", "zstd")):
            assert browser.run(get, f"/page{suffix}.txt") == [f"from {suffix}", coding, "text/plain; charset=utf-8"]


def test_sound_is_sought_by_ranges(browser: Browser, tmp_path: Path, asked: Any) -> None:
    seconds = 120
    with wave.open(str(tmp_path / "silence.wav"), "wb") as sound:
        sound.setparams((1, 2, 44_100, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 44_100 * seconds))
    (tmp_path / "page.html").write_text("<!doctype html><audio src='silence.wav' preload='metadata' controls></audio>")
    with served(files_of(tmp_path)) as server:
        browser.show(server, "/page.html")
        found = browser.run("""
            const sound = document.querySelector("audio")
            if (sound.readyState === 0) await new Promise(done => sound.onloadedmetadata = done)
            sound.currentTime = 110
            await new Promise(done => sound.onseeked = done)
            return [sound.duration, sound.currentTime, sound.error]""")
        assert found == [seconds, 110, None]
        ranges = browser.run("""
            const answer = await fetch("silence.wav", {cache: "no-store", headers: {Range: "bytes=8-11"}})
            return [answer.status, answer.headers.get("content-range"), await answer.text()]""")
        size = (tmp_path / "silence.wav").stat().st_size
        assert ranges == [206, f"bytes 8-11/{size}", "WAVE"]
        browser.driver.get("about:blank")
        wait_until(server, lambda: all(row["path"] is None for row in server.table.snapshot()))
    statuses = [each["status"] for each in asked() if each["target"] == "/silence.wav"]
    assert statuses.count(206) >= 3  # from the beginning, from what was sought, and the last
    assert set(statuses) <= {206, 304}  # 304: the browser asks whether what it has of the file is still true


def test_connections_are_kept(browser: Browser, tmp_path: Path, asked: Any) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "large.bin").write_bytes(bytes(300_000))
    with served(files_of(tmp_path)) as server:
        browser.show(server)
        fetched = browser.run("""
            const get = async path => (await (await fetch(path, {cache: "no-store"})).arrayBuffer()).byteLength
            let sum = 0
            for (let i = 0; i < 20; i++) sum += await get(i % 2 ? "small.txt" : "large.bin")
            const sizes = await Promise.all(Array.from({length: 60}, () => get("small.txt")))
            return sizes.reduce((a, b) => a + b, sum)""")
        assert fetched == 10 * 300_000 + 10 * 5 + 60 * 5
        assert len(asked()) == 81
        assert server.stats()["accepted"] <= 6  # as many as the browser opens to one host


# -- an API, and an application ---------------------------------------------------------------------------------------


def test_a_page_talks_to_the_api(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notes, "notes", {})
    monkeypatch.setattr(Notes, "last", [0])
    with served(Notes) as server:
        browser.show(server, "/notes")
        assert browser.texts("body") == ["{}\n"]
        found = browser.run("""
            const put = await fetch("/notes", {method: "POST", body: JSON.stringify({text: "Mülk"})})
            const place = put.headers.get("location")
            const got = await (await fetch(place)).json()
            const gone = (await fetch(place, {method: "DELETE"})).status
            const form = new FormData()
            form.append("file", new Blob([new Uint8Array(300000)]), 'a "quoted" ü.bin')
            const files = await (await fetch("/files", {method: "POST", body: form})).json()
            const lines = (await (await fetch("/numbers/100000")).text()).split("\\n")
            return [put.status, place, got, gone, files, lines.length, lines[99999]]""")
        assert found[:4] == [201, "/notes/1", {"id": 1, "text": "Mülk"}, 204]
        assert found[4] == {"a %22quoted%22 ü.bin": 300_000}  # as browsers send quotes
        assert found[5:] == [100_001, "99999"]


def test_a_download_that_the_page_breaks_off(browser: Browser) -> None:
    with served(Notes) as server:
        browser.show(server, "/notes")
        browser.run("""
            const stop = new AbortController()
            const answer = await fetch("/numbers/100000000", {signal: stop.signal})
            await answer.body.getReader().read()
            stop.abort()""")
        wait_until(server, lambda: not [each for each in server.table if each.handler.state_name == "more"])


def test_an_upload_that_is_too_large(browser: Browser) -> None:
    with served(Notes) as server:
        browser.show(server, "/notes")
        for size in (1_100_000, 8_000_000):
            status = browser.run(
                "return (await fetch('/files', {method: 'POST', body: new Uint8Array(arguments[0])})).status", size
            )
            assert status == 413
            assert ["413" in each for each in browser.complaints()] == [True]


app = flask.Flask(__name__)
app.secret_key = "of a test"


@app.get("/")
def form() -> str:
    return flask.render_template_string("""<!doctype html><p>{{ session.get("said", "nothing") }}</p>
        <form method="post" enctype="multipart/form-data">
        <input name="text"><input type="file" name="file"><button>Send</button></form>""")


@app.post("/")
def take() -> flask.typing.ResponseReturnValue:
    sent = flask.request.files["file"]
    flask.session["said"] = f"{flask.request.form['text']}: {len(sent.read())} bytes in {sent.filename}"
    return flask.redirect("/", 303)


@pytest.mark.parametrize("dispatch", ["pool", "greenlet"])
def test_a_form_with_a_file_for_flask(browser: Browser, tmp_path: Path, dispatch: str) -> None:
    (tmp_path / "ä file.bin").write_bytes(os.urandom(400_000))
    with served(wsgi_handler(app), dispatch) as server:
        browser.show(server)
        assert browser.texts("p") == ["nothing"]
        browser.find("input[name=text]").send_keys("<i>höt")
        browser.find("input[type=file]").send_keys(str(tmp_path / "ä file.bin"))
        browser.find("button").click()
        browser.until("document.querySelector('p').textContent !== 'nothing'")
        assert browser.texts("p") == ["<i>höt: 400000 bytes in ä file.bin"]
        browser.driver.delete_all_cookies()


class Form(HTTPRequestHandler):
    """Shows a form, and what was sent with it."""

    def do_GET(self) -> Transition:
        kind = self.request.query or "multipart/form-data"
        page = (
            f'<!doctype html><meta charset="utf-8"><form method="post" enctype="{kind}">'
            '<textarea name="a&=b"></textarea><input type="file" name="files" multiple>'
            '<input type="file" name="none"><button>Send</button></form>'
        )
        return self.answer(200, page, content_type="text/html; charset=utf-8")

    def do_POST(self) -> Transition:
        return self.answer(200, json.dumps([(part.name, part.text, part.filename) for part in self.request.form()]))


@pytest.mark.parametrize("kind", ["multipart/form-data", "application/x-www-form-urlencoded"])
def test_a_form_of_a_handler(browser: Browser, tmp_path: Path, kind: str) -> None:
    names = ["one \\ ü.txt", "a 'quote';.txt"]
    for name in names:
        (tmp_path / name).write_text(f"in {name}")
    with served(Form) as server:
        browser.show(server, f"/?{kind}")
        browser.find("textarea").send_keys("two\nlines ü+%&=")
        browser.find("[name=files]").send_keys("\n".join([str(tmp_path / name) for name in names]))
        browser.find("button").click()
        browser.until("document.body.textContent.startsWith('[')")
        shown = json.loads(browser.texts("body")[0])
    assert shown[0] == ["a&=b", "two\r\nlines ü+%&=", None]
    if kind == "multipart/form-data":
        assert shown[1:] == [*[["files", f"in {name}", name] for name in names], ["none", "", ""]]
    else:
        assert shown[1:] == [*[["files", name, None] for name in names], ["none", "", None]]


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_that_a_page_missed_come_when_it_connects_again(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_ids: list[str | None] = []

    class Watched(Events):
        def listen(self) -> Transition:
            last_ids.append(self.request.get("last-event-id"))
            return super().listen()

    monkeypatch.setattr(Events, "recent", deque(maxlen=10))
    monkeypatch.setattr(Events, "last", [40])
    with served(Watched) as server:

        def post(text: str) -> None:
            with urlopen(Request(f"http://127.0.0.1:{server.server_address[1]}/events", text.encode())) as answer:
                answer.read()

        def listening() -> list[Any]:
            return [each for each in server.table if each.handler.state_name == "listening"]

        browser.show(server)
        browser.until("document.getElementById('status').textContent === 'connected'")
        browser.find("#text").send_keys("<img src=x onerror=document.title='run'>\n")
        browser.until("document.querySelectorAll('#seen li').length === 1")
        assert browser.texts("#seen li") == ["<img src=x onerror=document.title='run'>"]
        (before,) = listening()
        server.table.cancel(before.id)
        wait_until(server, lambda: before not in listening())
        post("missed\nof two lines")
        browser.until("document.querySelectorAll('#seen li').length === 2")
        assert browser.texts("#seen li:first-child") == ["missed\nof two lines"]
        assert browser.texts("#status") == ["connected"]
        assert ["INCOMPLETE_CHUNKED" in each for each in browser.complaints()] == [True]
        assert last_ids == [None, "41"]
        assert browser.driver.title == "Events"
        browser.driver.get("about:blank")
        wait_until(server, lambda: not Events.listeners)


# -- WebSockets -------------------------------------------------------------------------------------------------------


class Echo(WebSocketHandler):
    """Sends back each message. Some words close, or send a ping."""

    message_bytes_max = 300_000

    def do_GET(self) -> Transition:
        return self.answer(200, "<!doctype html>", content_type="text/html")

    def on_message(self, message: str | bytes) -> Transition:
        if message == "close":
            self.close_ws(3000, "as yöu wish")
        elif message == "ping":
            self.ping(b"p" * 100)
        elif isinstance(message, str):
            self.send_text(message)
        else:
            self.send_bytes(message)


SOCKET = """
    const socket = new WebSocket(location.origin.replace("http", "ws") + "/")
    socket.binaryType = "arraybuffer"
    const next = name => new Promise(done => socket["on" + name] = done)
    const ask = async message => { socket.send(message); return (await next("message")).data }
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_messages_of_a_websocket(browser: Browser, tmp_path: Path, scheme: str) -> None:
    config = reqtable.Config()
    if scheme == "https":
        config = reqtable.Config(tls=TLSOptions(cert=write_certificate(tmp_path, "127.0.0.1")))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Echo, config=config)) as server:
        browser.show(server, scheme=scheme)
        found = browser.run(
            SOCKET
            + """
            await next("open")
            const text = "ü🙂".repeat(20000), random = crypto.getRandomValues(new Uint8Array(60000))
            const same = [await ask("small") === "small", await ask(text) === text, await ask("") === ""]
            const back = new Uint8Array(await ask(random)), blob = await ask(new Blob(["blob"]))
            same.push(back.length === 60000 && back.every((byte, i) => byte === random[i]), blob.byteLength === 4)
            socket.send("close")
            const end = await next("close")
            return [socket.extensions, same, end.code, end.reason, end.wasClean]"""
        )
        extensions = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        assert found == [extensions, [True] * 5, 3000, "as yöu wish", True]


def test_a_browser_answers_pings(browser: Browser) -> None:
    with served(Echo) as server:
        browser.show(server)
        browser.run(SOCKET + "await next('open'); window.socket = socket")
        (entry,) = [each for each in server.table if each.handler.websocket]
        received = entry.bytes_in
        browser.run("socket.send('ping')")
        wait_until(server, lambda: entry.bytes_in >= received + (6 + 4) + (6 + 100))
        assert (
            browser.run("socket.close(4000, 'bye'); return (await new Promise(done => socket.onclose = done)).code")
            == 4000
        )


def test_websockets_that_are_refused(browser: Browser) -> None:
    with served(Echo) as server, served(Echo) as other:
        browser.show(server)
        end = browser.run(
            SOCKET + "await next('open'); socket.send('x'.repeat(300001)); return (await next('close')).code"
        )
        assert end == 1009
        end = browser.run(
            """
            const socket = new WebSocket(arguments[0])
            return (await new Promise(done => socket.onclose = done)).code""",
            f"ws://127.0.0.1:{other.server_address[1]}/",
        )
        assert end == 1006
        assert ["403" in each for each in browser.complaints()] == [True]


def test_a_chat_between_two_pages(browser: Browser) -> None:
    attack = "<img src=x onerror=document.title='run'>"
    lines = "#said li"
    with served(Room) as server:

        def in_the_room() -> dict[str, Any]:
            return {each.handler.name: each for each in server.table if each.handler.websocket and each.handler.name}

        def has_said(text: str) -> str:
            return f"document.querySelector('#said li:last-child').textContent === {json.dumps(text)}"

        browser.show(server)
        browser.find("#text").send_keys("<b>ann\n")
        browser.until(has_said("<b>ann has joined"))
        with browser.new_tab():
            browser.show(server)
            browser.find("#text").send_keys("<b>ann\n")
            browser.until("document.getElementById('status').textContent === 'that name is taken'")
            browser.find("#text").send_keys("bob\n")
            browser.until(has_said("bob has joined"))
            browser.find("#text").send_keys(attack + "\n")
            browser.until(has_said(f"bob: {attack}"))
            assert browser.texts(lines) == ["here: <b>ann", "bob has joined", f"bob: {attack}"]
            assert browser.run("return [document.images.length, document.title]") == [0, "A chat room"]
        browser.until(has_said("bob has left"))
        assert browser.texts(lines)[1:] == ["bob has joined", f"bob: {attack}", "bob has left"]
        assert browser.run("return [document.images.length, document.title]") == [0, "A chat room"]

        server.table.cancel(in_the_room()["<b>ann"].id)
        browser.until("document.querySelectorAll('#said li').length === 5")
        assert browser.texts(lines)[4:] == ["<b>ann has joined"]
        assert browser.texts("#status") == ["<b>ann"]
        browser.find("#text").send_keys("back\n")
        browser.until(has_said("<b>ann: back"))


def test_the_chat_of_the_page_on_websockets(browser: Browser) -> None:
    with served(defined("write-a-websocket", "chat.py")["Chat"]) as server:
        browser.show(server)
        with browser.new_tab():
            browser.show(server)
            wait_until(server, lambda: len([each for each in server.table if each.handler.websocket]) == 2)
            browser.find("input").send_keys(ATTACKS[0] + "\n")
            browser.until("document.querySelectorAll('li').length === 1")
        browser.until("document.querySelectorAll('li').length === 1")
        assert browser.texts("li") == [ATTACKS[0]]
        assert browser.run("return [document.images.length, document.title]") == [0, "Chat"]
