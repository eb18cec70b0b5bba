"""What `reqtable top` shows and what its keys do: the model, the view and the keyboard, without a terminal."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import click
import pytest

from reqtable.control.joining import summed as joined
from reqtable.control.query import ORDERS, QueryError
from reqtable.run.commands import servers
from reqtable.run.commands.finding import Found
from reqtable.run.commands.servers import Servers
from reqtable.run.top.controls import SORT_KEYS, filters_of, press
from reqtable.run.top.figures import Figures
from reqtable.run.top.keys import keys_of
from reqtable.run.top.model import SEARCH_ROWS, Act, Model, Page, Sample, Unanswered
from reqtable.run.top.view import frame, plain_frame, shares
from reqtable.table.states import State
from tests.pages import text_of

WORKER = 4711


def row(id: int, **given: Any) -> dict[str, Any]:
    return {
        "id": id,
        "kind": "client",
        "parent": None,
        "worker": WORKER,
        "peer": f"127.0.0.1:{50_000 + id}",
        "local": "127.0.0.1:80",
        "server": "Server",
        "handler": "Notes",
        "handler_state": "command",
        "source": "notes.py:23",
        "policy": "inline",
        "state": "READING",
        "letter": "R",
        "waits_for": "line(limit=512)",
        "age_s": 100.0 - id,
        "idle_s": float(id),
        "deadline_s": None,
        "bytes_in": 10 * id,
        "bytes_out": 0,
        "buffered_in": 0,
        "buffered_out": 0,
        "steps": 1,
        **given,
    }


def stats(worker: int = WORKER, **given: Any) -> dict[str, Any]:
    loop = {"passes": 0, "busy_s": 0.0, "due": 0, "lag_s": 0.0, "lag_s_max": 0.0}
    counts = {"accepted": 0, "finished": {"done": 0, "reset": 0}, "refused": {}, "bytes_in": 0, "bytes_out": 0}
    loop.update({name: given.pop(name) for name in loop if name in given})
    counts.update({name: given.pop(name) for name in counts if name in given})
    return {
        "worker": worker,
        "entries": 3,
        "connections": 0,
        "entries_max": 1000,
        "buffered_bytes": 0,
        "states": {"READING": 3},
        "is_draining": False,
        "loop": loop,
        "servers": [{"handler": "Notes", "address": "127.0.0.1:80", **counts}],
        **given,
    }


def summed(*own: dict[str, Any]) -> dict[str, Any]:
    """The answer of a supervisor, as far as `top` reads it."""
    return {**own[0], "workers": list(own)}


def answer(model: Model, rows: list[dict[str, Any]], found: Any = None, at: float = 0.0, **given: Any) -> None:
    wanted = model.wanted()
    model.take(Sample(wanted, at, 0.002, found or stats(), rows[: wanted.limit], **given))


def model_of(count: int, height: int = 4) -> Model:
    model = Model(height=height)
    answer(model, [row(id) for id in range(1, count + 1)])
    return model


def type_in(model: Model, *keys: str) -> list[Act | None]:
    return [press(model, key) for key in keys]


def screen(model: Model, width: int = 80, height: int = 24) -> list[str]:
    lines = frame(model, width, height, now=0.0)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    return [line.plain for line in lines]


# -- rates ------------------------------------------------------------------------------------------------------------


def test_rates_are_what_happened_between_two_looks() -> None:
    figures = Figures()
    figures.take([stats(accepted=10, busy_s=1.0, passes=5)], at=100.0)
    assert figures.rates() is None
    after = stats(
        accepted=30, finished={"done": 8, "reset": 2}, refused={"entries_max": 6}, bytes_in=2048,
        busy_s=1.5, passes=105, due=4, lag_s=0.008,
    )  # fmt: skip
    figures.take([after], at=102.0)
    rates = figures.rates()
    assert rates is not None
    assert (rates.accepted, rates.finished, rates.refused) == (10, {"done": 4, "reset": 1}, 3)
    assert (rates.bytes_in, rates.bytes_out, rates.busy) == (1024, 0, 0.25)
    assert rates.pass_s == pytest.approx(0.005)
    assert rates.late_s == pytest.approx(0.002)


def test_the_rates_of_workers_are_added_and_a_new_one_begins_without() -> None:
    figures = Figures()
    figures.take([stats(1, accepted=5), stats(2, accepted=1000)], at=0)
    figures.take([stats(1, accepted=7), stats(2, accepted=1001), stats(3, accepted=900)], at=1)
    rates = [figures.rates(worker=worker) for worker in (1, 2, 3, None)]
    assert [each and each.accepted for each in rates] == [2, 1, None, 3]
    figures.take([stats(3, accepted=903)], at=2)  # the others are stuck, or have ended
    figures.take([stats(1, accepted=8), stats(3, accepted=904)], at=3)
    rates = [figures.rates(worker=worker) for worker in (1, 3, None)]
    assert [each and each.accepted for each in rates] == [None, 1, 1]


def test_counts_that_begin_anew_give_no_negative_rate() -> None:
    figures = Figures()
    figures.take([stats(accepted=50, finished={"done": 9})], at=0)
    figures.take([stats(accepted=2, finished={"done": 1})], at=1)
    rates = figures.rates()
    assert rates is not None
    assert (rates.accepted, rates.finished) == (0, {})


# -- the selection ----------------------------------------------------------------------------------------------------


def test_only_the_rows_on_the_screen_and_one_more_are_asked_for() -> None:
    model = model_of(100)
    assert model.wanted().limit == 5
    assert len(model.rows) == 5


def test_moving_past_the_rows_asks_for_more() -> None:
    model = model_of(100)
    assert type_in(model, "down", "j", "down") == [None] * 3
    assert press(model, "down") == Act("look")
    assert (model.place, model.offset, model.wanted().limit) == (4, 1, 6)
    answer(model, [row(id) for id in range(1, 101)])
    assert press(model, "page-down") == Act("look")
    assert model.selected is None
    answer(model, [row(id) for id in range(1, 101)])
    assert model.selected == row(9)
    type_in(model, "up", "k", "page-up", "page-up")
    assert (model.place, model.offset) == (0, 0)


def test_an_answer_with_too_few_rows_does_not_move_the_selection_back() -> None:
    model = model_of(100)
    before = model.wanted()
    type_in(model, *["down"] * 7)
    model.take(Sample(before, 1.0, 0.0, stats(), [row(id) for id in range(1, before.limit + 1)]))
    assert model.selected is None
    answer(model, [row(id) for id in range(1, 101)])
    assert model.selected == row(8)


def test_the_selection_ends_at_the_last_row() -> None:
    model = model_of(3)
    assert type_in(model, *["down"] * 5) == [None] * 5
    assert model.selected == row(3)
    press(model, "home")
    assert model.selected == row(1)
    empty = model_of(0)
    assert type_in(empty, "down", "Enter", "enter", "K") == [None] * 4
    assert (empty.selected, empty.question, empty.page) == (None, None, Page.ROWS)


def test_the_selection_follows_its_request_and_then_stays_in_its_place() -> None:
    model = model_of(4)
    type_in(model, "down", "down")
    answer(model, [row(3), row(1), row(2)])
    assert (model.place, model.selected) == (0, row(3))
    type_in(model, "down")
    answer(model, [row(3), row(2)])
    assert model.selected == row(2)
    answer(model, [row(3)])
    assert model.selected == row(3)


def test_every_order_has_a_key_and_s_goes_through_them() -> None:
    assert sorted(SORT_KEYS.values()) == sorted(ORDERS)
    for key, order in SORT_KEYS.items():
        model = model_of(3)
        assert press(model, key) == Act("look")
        assert model.wanted().sort == order
    model = model_of(3)
    assert len({press(model, "s") and model.sort for _ in ORDERS}) == len(ORDERS)
    press(model, "n")
    assert [each["id"] for each in model.rows] == [3, 2, 1], "until the answer comes, those that are there are sorted"


def test_an_answer_to_a_question_of_before_changes_no_rows() -> None:
    model = model_of(2)
    before = model.wanted()
    press(model, "n")
    rows = list(model.rows)
    model.take(Sample(before, 1.0, 0.0, stats(entries=77), [row(5)]))
    assert (model.rows, model.stats()["entries"]) == (rows, 77)


# -- filters, search, workers -----------------------------------------------------------------------------------------


def test_filters_are_typed() -> None:
    model = model_of(2)
    press(model, "f")
    type_in(model, *"handlex", "backspace", *"r=Notes state=r")
    assert screen(model)[-1] == "filter, such as older=40 handler=Notes: handler=Notes state=r_"
    assert press(model, "enter") == Act("look")
    assert model.wanted().filters == {"handler": "Notes", "state": "R"}
    assert "sort age   handler=Notes   state=R" in screen(model)
    type_in(model, "f", "ctrl-u", *"older=40", "escape")
    assert model.wanted().filters == {"handler": "Notes", "state": "R"}
    assert type_in(model, "f", "ctrl-u", "enter")[-1] == Act("look")
    assert model.wanted().filters == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello", "hello: write a filter as NAME=VALUE"),
        ("limit=3", "limit=3: write a filter as NAME=VALUE"),
        ("colour=red", "there is no filter 'colour': use state,"),
        ("older=old", "older=old: give a number"),
        ("state=Q", "no state is named 'Q'"),
        ("peer='a", "peer='a: a quotation mark is missing"),
    ],
)
def test_a_filter_that_means_nothing_changes_nothing(text: str, says: str) -> None:
    model = model_of(2)
    assert type_in(model, "f", *text, "enter")[-1] is None
    assert model.wanted().filters == {}
    assert screen(model)[-1].startswith(says)
    with pytest.raises(QueryError):
        filters_of(text)


def test_a_filter_may_have_spaces() -> None:
    model = model_of(2)
    type_in(model, "f", *"path='/a b'", "enter")
    assert model.wanted().filters == {"path": "/a b"}
    assert type_in(model, "f", "enter")[-1] == Act("look")
    assert model.wanted().filters == {"path": "/a b"}


def test_a_search_shows_the_rows_that_have_the_text() -> None:
    model = model_of(9)
    assert type_in(model, "/", *"BODY", "enter")[-1] == Act("look")
    assert model.wanted().limit == SEARCH_ROWS
    answer(model, [row(1), row(2, handler_state="body"), row(3, path="/somebody"), row(4)])
    assert [each["id"] for each in model.rows] == [2, 3]
    assert 'sort age   with "BODY" of the first 1,000: 2' in screen(model)
    assert press(model, "escape") == Act("look")
    assert model.wanted().limit == model.height + 1
    assert press(model, "escape") is None


def test_w_goes_through_the_workers() -> None:
    model = model_of(2)
    assert press(model, "w") is None
    assert screen(model)[-1] == "the server has only one process"
    answer(model, [row(1)], summed(stats(12, entries=1), stats(11, entries=2)))
    found = []
    for _ in range(3):
        assert press(model, "w") == Act("look")
        answer(model, [row(1)], summed(stats(12, entries=1), stats(11, entries=2)))
        found.append((model.wanted().filters, model.stats()["entries"]))
    assert found == [({"worker": "11"}, 2), ({"worker": "12"}, 1), ({}, 1)]


def test_a_stuck_worker_is_red_and_its_stack_is_shown() -> None:
    model = Model()
    stuck = {"worker": 13, "is_stuck": True, "heard_s": 12.0, "stack": ["sticking.py:14 hold_up"]}
    whole = summed(*[stats(number) for number in range(20, 40)])
    answer(model, [row(1)], whole, workers=[stuck])
    [line] = [line for line in frame(model, 80, 24, 0.0) if line.plain.startswith("workers")]
    assert line.plain.startswith("workers   13 STUCK 12.0s, 20 3 req")
    assert line.plain.endswith(" more")
    assert [str(span.style) for span in line.spans if line.plain[span.start : span.end].startswith("13")] == [
        "bold red"
    ]
    press(model, "w")
    answer(model, [], whole, workers=[stuck])
    lines = screen(model)
    assert "worker 13 is stuck in" in lines
    assert "  sticking.py:14 hold_up" in lines


def test_a_restart_is_a_line_while_it_is_news_and_a_failed_one_is_red() -> None:
    model = Model()
    going = {"phase": "moving", "check": False, "pid": 12, "moved": 3250, "left": 1750, "ago_s": 1.0, "problem": None}
    answer(model, [row(1)], stats(restart=going, taken=None))
    assert "restart   3250 of 5000 requests moved to process 12" in screen(model)
    failed = going | {"phase": "failed", "problem": "it\x1b[31m does not start"}
    answer(model, [row(1)], stats(restart=failed, taken=None))
    [line] = [line for line in frame(model, 80, 24, 0.0) if line.plain.startswith("restart")]
    assert line.plain == "restart   failed 1.0s ago: it\\x1b[31m does not start"
    assert str(line.style) == "bold red"
    taken = {"moved": 2, "giving": 1, "longest_freeze_s": 0.031, "ago_s": 90.0}
    answer(model, [row(1)], stats(restart=None, taken=taken))
    words = "2 requests taken over 90.0s ago, frozen 31ms at most"
    assert any(each.startswith(f"restart   {words}") for each in screen(model))
    answer(model, [row(1)], stats(restart=None, taken=taken | {"giving": 0}))
    assert not any(each.startswith("restart") for each in screen(model))


def test_rows_that_have_moved_say_so() -> None:
    model = Model()
    answer(model, [row(1, moves=0), row(2, moves=0)])
    assert not any(" moves " in each for each in screen(model))
    answer(model, [row(1, moves=0), row(2, moves=3)])
    assert any(" moves " in each for each in screen(model))


# -- actions ----------------------------------------------------------------------------------------------------------


def test_a_kill_is_asked_and_is_about_the_request_that_was_selected() -> None:
    model = model_of(3)
    assert type_in(model, "down", "K") == [None, None]
    answer(model, [row(3), row(1)])
    assert screen(model)[-1] == "End request 2 (127.0.0.1:50002, Notes at command)? y/n"
    assert press(model, "y") == Act("cancel", 2, None, "127.0.0.1:50002")
    for key in ("n", "enter", "escape", "q", "K"):
        press(model, "K")
        assert press(model, key) is None
        assert model.question is None


def test_a_drain_is_asked_for_the_server_or_the_chosen_worker() -> None:
    model = model_of(1)
    press(model, "D")
    assert screen(model)[-1] == "Drain the server? It ends when its requests are done. y/n"
    assert press(model, "y") == Act("drain")
    answer(model, [row(1)], summed(stats(11), stats(12)))
    type_in(model, "w", "D")
    assert screen(model)[-1] == "Drain worker 11? Another one takes its place. y/n"
    assert press(model, "y") == Act("drain", 11)


def test_a_request_is_opened_killed_and_left() -> None:
    model = model_of(3)
    assert type_in(model, "down", "enter") == [None, Act("look")]
    assert model.wanted().id == 2
    detail = row(2, fields={"words": "3"}, stack=["a.py:1 f"], input_head="\x1b[2J", path="/" + "x" * 300)
    answer(model, [], detail=detail)
    lines = screen(model, height=40)
    assert "id             2                        kind           client" in lines
    assert "  words  3" in lines
    assert "  a.py:1 f" in lines
    assert "source         notes.py:23" in "\n".join(lines)
    assert r"'\x1b[2J'" in "\n".join(lines)
    assert "".join(lines).count("x") >= 300, "a long value is continued in the next line"
    assert press(model, "K") is None
    assert press(model, "y") == Act("cancel", 2, None, "127.0.0.1:50002")
    answer(model, [], detail=None)
    assert screen(model)[1] == "request 2  has ended: this is how it was last seen"
    assert press(model, "q") == Act("look")
    assert (model.page, model.wanted().id) == (Page.ROWS, None)


def test_the_request_of_a_stuck_worker_has_not_ended() -> None:
    model = model_of(1)
    press(model, "enter")
    stuck = {"worker": WORKER, "is_stuck": True, "heard_s": 12.0, "stack": []}
    answer(model, [], summed(stats(2)), workers=[stuck])
    assert screen(model)[1] == "request 1  its worker does not answer"


def test_no_worker_answers() -> None:
    model = Model()
    stuck = {"worker": WORKER, "is_stuck": True, "heard_s": 12.0, "stack": []}
    answer(model, [], joined([]), workers=[stuck])
    lines = screen(model)
    assert lines[1] == "requests  -"
    assert f"workers   {WORKER} STUCK 12.0s" in lines
    assert model.worker_pids() == [WORKER]


def test_a_long_page_is_scrolled_and_not_past_its_end() -> None:
    model = model_of(1)
    press(model, "enter")
    answer(model, [], detail=row(1, fields={}, stack=[f"a.py:{number} f" for number in range(50)]))
    first = screen(model)
    press(model, "down")
    assert screen(model)[2] == first[3]
    for _ in range(9):
        press(model, "page-down")
        last = screen(model)
    assert last[-2] == "  a.py:49 f"
    press(model, "home")
    assert screen(model) == first


def test_pause_and_help_and_quit() -> None:
    model = model_of(2)
    assert (press(model, "p"), model.is_paused) == (None, True)
    assert screen(model)[0].endswith("PAUSED")
    assert (press(model, "p"), model.is_paused) == (None, False)
    press(model, "?")
    page = screen(model)
    for key in ("s", "f", "/", "w", "K", "D", "p", "q", "Enter", *SORT_KEYS):
        assert any(line.split("  ")[0].split().count(key) for line in page), key
    assert not [line for line in page[7:] if line.endswith("…")]
    assert press(model, "q") is None
    assert model.page is Page.ROWS
    assert press(model, "q") == Act("quit")
    type_in(model, "f", "q")
    assert press(model, "ctrl-c") == Act("quit")


# -- the view ---------------------------------------------------------------------------------------------------------


def test_the_whole_screen() -> None:
    model = Model()
    answer(model, [], stats())
    after = stats(
        accepted=20, finished={"done": 12, "reset": 2}, bytes_in=4096, busy_s=0.5, passes=100, due=1, lag_s=0.001
    )
    answer(model, [row(1), row(2, letter="S", handler_state="ranked")], after, at=2.0)
    lines = screen(model, height=14)
    assert lines[0].startswith("reqtable top  Notes 127.0.0.1:80  ")
    assert lines[1:] == [
        "requests  3, at most 1000   connections 0   buffers 0",
        "a second  in 2.0K  out 0   accepted 10   finished 7.0: done 6.0, reset 1.0",
        "loop      busy 25%   pass 5ms   late 1ms, 0ms at most   answer 2ms",
        f"[{'R' * 78}]",
        "states    R reading 3  ",
        "sort age",
        "id  st  peer             handler  at         age  idle  mem  in  out  waits for",
        " 1  R   127.0.0.1:50001  Notes    command  99.0s  1.0s    0  10    0  line(limi…",
        " 2  S   127.0.0.1:50002  Notes    ranked   98.0s  2.0s    0  20    0  line(limi…",
        "",
        "",
        "",
        "? help  s sort  f filter  / search  Enter open  K kill  D drain  p pause  q quit"[:80],
    ]


@pytest.mark.parametrize("page", list(Page))
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (20, 5), (1, 1), (3, 2), (40, 10)])
def test_every_size_is_filled_exactly(page: Page, width: int, height: int) -> None:
    model = model_of(100)
    if page is Page.DETAIL:
        press(model, "enter")
    model.page = page
    answer(model, [row(id) for id in range(1, 101)], detail=row(1) if page is Page.DETAIL else None)
    screen(model, width, height)
    assert model.height >= 1


def test_every_state_has_a_share_of_the_bar_and_a_style() -> None:
    assert shares([1, 1000, 1], 10) == [1, 8, 1]
    assert shares([5, 5], 10) == [5, 5]
    assert sum(shares([7, 11, 13, 1], 78)) == 78
    assert shares([1, 1, 1], 2) == [1, 1, 1]
    states = [state for state in State if state is not State.CLOSED]
    model = Model()
    answer(model, [], stats(states={state.name: 1 for state in states}))
    [bar] = [line for line in frame(model, 80, 24, 0.0) if line.plain.startswith("[")]
    assert [letter for letter, _ in itertools.groupby(bar.plain[1:-1])] == [state.value for state in states]
    assert len({str(span.style) for span in bar.spans}) >= 8


HOSTILE = "/[red]\x1b[2J\x9b31m\u202e\x07[/red]"


def test_what_a_client_sent_is_printable_and_no_markup() -> None:
    model = Model()
    rows = [row(1, path=HOSTILE, peer=HOSTILE, handler_state=HOSTILE, waits_for=HOSTILE, handler=HOSTILE)]
    answer(model, rows)
    type_in(model, "/", *"red", "enter", "K")
    pages = [screen(model, 200)]
    model.question = None
    type_in(model, "enter")
    answer(
        model, [], detail={**rows[0], "fields": {HOSTILE: HOSTILE}, "stack": [HOSTILE], "input_head": "\x1b[red]\x9b"}
    )
    pages.append(screen(model, 200, 60))
    model.fail(HOSTILE)
    pages.append(screen(model, 200))
    for page in pages:
        text = "".join(page)
        assert text.isprintable()
        assert "[red]" in text
        assert "[/red]" in text
    assert all(line.isprintable() for line in plain_frame(model, 132, 0.0))


def test_a_client_does_not_decide_how_long_a_line_is() -> None:
    model = Model()
    answer(model, [row(1, path="e" + "\u0301" * 100_000, peer="日" * 9000, handler_state="x" * 9000)])
    for line in screen(model) + plain_frame(model, 132, 0.0):
        assert len(line) < 1000


def test_why_there_is_no_answer_is_shown_until_there_is_one() -> None:
    model = model_of(3)
    model.fail("c.sock: there is no such socket")
    lines = screen(model)
    assert lines[0] == "reqtable top  c.sock: there is no such socket"
    assert any("127.0.0.1:50003" in line for line in lines), "what was there stays"
    answer(model, [row(1)])
    assert "Notes 127.0.0.1:80" in screen(model)[0]
    answer(model, [row(1)], stats(is_draining=True))
    assert screen(model)[0].endswith("DRAINING")


def test_the_page_in_the_docs_names_every_key() -> None:
    page = text_of("docs/how-to/watch-on-a-screen.md")
    keys = page.partition("| key | what it does |")[2].partition("\n\n")[0]
    for key in ("s", "f", "/", "w", "j", "k", "K", "D", "p", "?", "q", *SORT_KEYS):
        assert f"`{key}`" in keys, key
    for key, order in SORT_KEYS.items():
        assert f"`{key}` {order}" in keys


# -- the keyboard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys", "rest"),
    [
        ("aK?", ["a", "K", "?"], ""),
        ("\r\n\x7f\x03\x15", ["enter", "enter", "backspace", "ctrl-c", "ctrl-u"], ""),
        ("\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H", ["up", "down", "page-up", "page-down", "home"], ""),
        ("\x1b[1;5Ax", ["x"], ""),
        ("\x1bq", ["escape", "q"], ""),
        ("\x1b\x1b[A", ["escape", "up"], ""),
        ("j\x1b", ["j"], "\x1b"),
        ("j\x1b[", ["j"], "\x1b["),
        ("\x1b[15", [], "\x1b[15"),
        ("ü", ["ü"], ""),
    ],
)
def test_keys(text: str, keys: list[str], rest: str) -> None:
    assert keys_of(text) == (keys, rest)


# -- asking -----------------------------------------------------------------------------------------------------------


class Recorded:
    """Answers like `Asked`, and records what it was asked."""

    def __init__(self, *rows: dict[str, Any], worker: int = WORKER, error: click.ClickException | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.rows = rows or (row(1),)
        self.worker = worker
        self.error = error

    def get(self, place: str, **query: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.asked.append((place, query))
        return stats(self.worker) if place == "/v1/stats" else list(self.rows)

    def find(self, place: str) -> Any:
        self.asked.append((place, {}))
        return next((each for each in self.rows if place == f"/v1/requests/{each['id']}"), None)

    def send(self, method: str, place: str, body: Any, also: int | None = None) -> Any:
        self.asked.append((place, body))
        return {"cancelled": body.get("ids"), "entries": 2}


def asking(**recorded: Recorded) -> Servers:
    """Return the servers with these names; the only one if it is named `only`."""
    made = Servers(["some.sock"])
    made._asked = {None if name == "only" else name: each for name, each in recorded.items()}  # type: ignore[misc]
    return made


def test_each_interval_costs_the_server_two_questions() -> None:
    model, server = model_of(3), Recorded()
    sample = asking(only=server).look(model.wanted())
    assert server.asked == [("/v1/stats", {}), ("/v1/requests", {"sort": "age", "limit": 5})]
    assert list(sample.rows) == [row(1)]
    press(model, "enter")
    server.asked.clear()
    asking(only=server).look(model.wanted())
    assert server.asked == [("/v1/stats", {}), ("/v1/requests/1", {})]


def test_a_server_that_does_not_answer_is_looked_for_again_unless_a_path_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = [Found("/run/1.sock", 1, "reqtable serve")]
    monkeypatch.setattr("reqtable.run.commands.finding.running", lambda: running)
    found, named = Servers([]), Servers(["/run/1.sock"])
    running[:] = [Found("/run/2.sock", 2, "reqtable serve"), Found("/run/3.sock", 3, "reqtable serve")]
    for each in (found, named):
        with pytest.raises(Unanswered, match=r"^/run/1\.sock: there is no such socket"):
            each.look(Model().wanted())
    assert {name: each.path for name, each in found._asked.items()} == {"2": "/run/2.sock", "3": "/run/3.sock"}
    assert [each.path for each in named._asked.values()] == ["/run/1.sock"]
    running.clear()
    with pytest.raises(Unanswered):
        found.look(Model().wanted())
    assert set(found._asked) == {"2", "3"}, "none runs now: the ones before are asked on"


def test_a_server_that_is_named_by_its_port_is_looked_for_again_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = [Found("/run/1.sock", 1, "reqtable serve")]
    monkeypatch.setattr("reqtable.run.commands.finding.running", lambda: running)
    monkeypatch.setattr("reqtable.run.commands.asking._addresses_of", lambda _: ["127.0.0.1:80"])
    named = Servers([":80"])
    for path in ("/run/1.sock", "/run/2.sock"):
        with pytest.raises(Unanswered, match=f"^{path}: there is no such socket"):
            named.look(Model().wanted())
        running[:] = [Found("/run/2.sock", 2, "reqtable serve")]


# -- several servers --------------------------------------------------------------------------------------------------


def looked_at(model: Model, **recorded: Recorded) -> Servers:
    """Have a model look at servers once. Returns the servers."""
    made = asking(**recorded)
    model.take(made.look(model.wanted()))
    return made


def test_several_servers_share_a_table_with_a_column_for_the_server() -> None:
    model = Model()
    looked_at(model, a=Recorded(row(1), row(3), worker=11), b=Recorded(row(1), row(2), worker=12))
    lines = screen(model, 120)
    assert lines[0].startswith("reqtable top  a Notes 127.0.0.1:80; b Notes 127.0.0.1:80  ")
    assert lines[1] == "requests  6, at most 2000 in all servers   connections 0   buffers 0"
    assert lines[4] == "workers   a 11 3 req, b 12 3 req"
    assert [line.split()[:2] for line in lines[8:13]] == [
        ["control", "id"],
        ["a", "1"],
        ["b", "1"],
        ["b", "2"],
        ["a", "3"],
    ]


def test_the_rates_of_several_servers_are_added_although_their_workers_have_the_same_number() -> None:
    model, a, b = Model(), Recorded(), Recorded()
    made = asking(a=a, b=b)
    for count in (0, 8):
        sample = made.look(model.wanted())
        own = [{**each, **stats(WORKER, accepted=count), "at": float(count)} for each in sample.stats["workers"]]
        model.take(sample._replace(stats={**sample.stats, "workers": own}))
    found = model.rates()
    assert found is not None
    assert found.accepted == 2, "one a second in each"


def test_a_kill_goes_to_the_server_of_the_request() -> None:
    model, a, b = Model(), Recorded(row(1), worker=11), Recorded(row(1), worker=12)
    made = looked_at(model, a=a, b=b)
    type_in(model, "down", "K")
    assert screen(model)[-1] == "End request 1 of b (127.0.0.1:50001, Notes at command)? y/n"
    act = press(model, "y")
    assert act == Act("cancel", 1, "b", "127.0.0.1:50001")
    a.asked.clear()
    assert made.act(act) == "ended request 1"
    assert (a.asked, b.asked[-1]) == ([], ("/v1/requests/cancel", {"ids": [1]}))
    with pytest.raises(Unanswered, match=r"^c has ended$"):
        made.act(Act("cancel", 1, "c"))


def test_a_kill_spares_the_request_of_a_server_that_has_taken_the_place() -> None:
    model = Model()
    looked_at(model, only=Recorded(row(1)))
    press(model, "K")
    act = press(model, "y")
    assert act is not None
    another = Recorded(row(1, peer="127.0.0.1:40000"))
    assert asking(only=another).act(act) == "request 1 had ended already"
    assert another.asked == [("/v1/requests/1", {})]


def test_the_selection_follows_a_request_of_its_server() -> None:
    model = Model()
    looked_at(model, a=Recorded(row(1)), b=Recorded(row(1)))
    press(model, "down")
    looked_at(model, a=Recorded(row(1, age_s=1.0)), b=Recorded(row(1)))
    assert (model.place, model.selected) == (0, {**row(1), "control": "b"})


def test_the_request_of_one_server_is_opened_there_only() -> None:
    model, a, b = Model(), Recorded(), Recorded()
    looked_at(model, a=a, b=b)
    type_in(model, "down", "enter")
    a.asked.clear()
    b.asked.clear()
    looked_at(model, a=a, b=b)
    assert a.asked == [("/v1/stats", {})]
    assert b.asked == [("/v1/stats", {}), ("/v1/requests/1", {})]
    assert (model.detail, model.has_ended) == ({**row(1), "control": "b"}, False)
    looked_at(model, a=a, b=Recorded(row(2)))
    assert model.has_ended


def test_w_goes_through_the_servers_and_a_drain_is_about_the_chosen_one() -> None:
    model, a, b = Model(), Recorded(row(1), worker=11), Recorded(row(2), worker=12)
    looked_at(model, a=a, b=b)
    press(model, "D")
    assert screen(model)[-1] == "there are several servers: choose one with w"
    found = []
    for _ in range(3):
        assert press(model, "w") == Act("look")
        looked_at(model, a=a, b=b)
        found.append((model.wanted().filters, [each["control"] for each in model.rows], model.stats()["entries"]))
    assert found == [({"control": "a"}, ["a"], 3), ({"control": "b"}, ["b"], 3), ({}, ["a", "b"], 6)]
    type_in(model, "w", "w", "D")
    assert screen(model)[-1] == "Drain the server b? It ends when its requests are done. y/n"
    assert press(model, "y") == Act("drain", None, "b")


def test_w_goes_through_the_workers_of_each_server() -> None:
    model = Model()
    own = [{**stats(pid), "control": name} for name, pid in (("a", 11), ("a", 12), ("b", 11))]
    answer(model, [], {**summed(*own)}, servers={"a": {}, "b": {}})
    assert model.choices() == [("a", None), ("a", 11), ("a", 12), ("b", None)]
    type_in(model, "w", "w", "D")
    assert screen(model)[-1] == "Drain worker 11 of a? Another one takes its place. y/n"
    assert press(model, "y") == Act("drain", 11, "a")


def test_a_server_is_chosen_by_a_filter() -> None:
    model = Model()
    looked_at(model, a=Recorded(), b=Recorded())
    assert type_in(model, "f", *"control=b older=3", "enter")[-1] == Act("look")
    a, b = Recorded(), Recorded()
    looked_at(model, a=a, b=b)
    assert a.asked == [("/v1/stats", {})]
    assert b.asked[1] == ("/v1/requests", {"sort": "age", "limit": model.height + 1, "older": "3"})
    assert [each["control"] for each in model.rows] == ["b"]


def test_a_server_that_does_not_answer_leaves_the_others_on_the_screen() -> None:
    model, gone = Model(), Recorded(error=click.ClickException("b.sock: there is no such socket"))
    looked_at(model, a=Recorded(row(7)), b=gone)
    lines = screen(model, 120)
    assert "a Notes 127.0.0.1:80  b: b.sock: there is no such socket" in lines[0]
    assert any(line.split()[:2] == ["a", "7"] for line in lines)
    with pytest.raises(Unanswered, match=r"^b\.sock: there is no such socket; b\.sock: there is no such socket$"):
        asking(b=gone, c=gone).look(model.wanted())


def test_a_restart_of_one_server_is_told_with_its_name() -> None:
    model = Model()
    going = {"phase": "moving", "check": False, "pid": 12, "moved": 3, "left": 1, "ago_s": 1.0, "problem": None}
    whole = {"a": stats(11, restart=None, taken=None), "b": stats(12, restart=going, taken=None)}
    answer(model, [], summed(*whole.values()), servers=whole)
    assert "restart   b: 3 of 4 requests moved to process 12" in screen(model)


def test_servers_are_named_by_their_sockets() -> None:
    paths = [["/run/a.sock", "/run/b.sock"], ["/run/1/c.sock", "/run/2/c.sock"], ["/run/a.sock"]]
    assert [list(Servers(each)._asked) for each in paths] == [["a", "b"], ["c", "c-2"], [None]]


def test_a_defect_in_one_answer_is_raised() -> None:
    with pytest.raises(KeyError):
        servers._each({"a": Recorded(), "b": Recorded()}, lambda name, _: {"a": 1}[name])  # type: ignore[arg-type, index]


def test_without_rich_the_extra_is_named() -> None:
    program = "import sys; sys.modules['rich'] = None; from reqtable.run.cli import main; main(['top', '--once'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "reqtable: reqtable top needs rich: pip install 'reqtable[top]'\n"
