"""The requests that gunicorn and llhttp test their parsers with, sent over sockets."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from reqtable.http import HTTPRequestHandler
from tests.http_suites import corpus
from tests.http_suites.corpus import Case
from tests.http_suites.suite import Failed, Skipped
from tests.support import Client, served

GUNICORN_MIN, LLHTTP_MIN, VALID_MIN = 70, 48, 85


class Answers(HTTPRequestHandler):
    """Answers everything with 200."""

    server_name = None

    def respond(self) -> Any:
        return self.answer(200, f"{self.request.method} {self.request.path} {len(self.request.body)}\n")


def answered(server: Any, data: bytes) -> tuple[list[int], bytes]:
    """Send `data`, then the end. Returns the statuses but 100, and all that came."""
    with Client(server.server_address) as client:
        came = client.send(data).end().rest()
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d\d\d) ", came) if each != b"100"], came


def send_invalid(server: Any) -> tuple[Counter[tuple[str, bool]], list[str]]:
    """Send what others call invalid. Returns how many of each project were refused or not, and those that were not."""
    counted: Counter[tuple[str, bool]] = Counter()
    let_through = []
    for case in corpus.cases():
        if not case.is_valid:
            statuses, _ = answered(server, case.data)
            is_refused = bool(statuses) and statuses[-1] >= 400
            counted[case.project, is_refused] += 1
            if not is_refused:
                let_through.append(case.source)
    return counted, let_through


def send_valid(server: Any) -> tuple[int, Counter[str], list[tuple[Case, list[int], bytes]]]:
    """Send what others call valid. Returns how many were answered, the reasons why others were not, and the rest."""
    accepted, refused, unexpected = 0, Counter[str](), []
    for case in corpus.cases():
        if case.is_valid:
            statuses, came = answered(server, case.with_host())
            reasons = [each for each in corpus.REFUSED if each.encode() in came]
            if statuses.count(200) >= case.requests:
                accepted += 1
            elif len(reasons) == 1:
                refused[reasons[0]] += 1
            else:
                unexpected.append((case, statuses, came))
    return accepted, refused, unexpected


def run(quick: bool) -> str:
    if corpus.path() is None:
        raise Skipped(corpus.MISSING)
    with served(Answers) as server:
        counted, let_through = send_invalid(server)
        accepted, refused, unexpected = send_valid(server)
    gunicorn, llhttp = counted["gunicorn", True], counted["llhttp", True]
    if new := [each for each in let_through if each not in corpus.ANSWERED]:
        raise Failed(f"invalid requests were answered: {new}")
    if gunicorn < GUNICORN_MIN or llhttp < LLHTTP_MIN or accepted < VALID_MIN or unexpected:
        raise Failed(f"{counted}, of the valid ones {accepted} answered, without a known reason refused: {unexpected}")
    return "\n".join(
        [
            f"of gunicorn's {gunicorn + counted['gunicorn', False]} invalid requests {gunicorn} refused, "
            f"of llhttp's {llhttp + counted['llhttp', False]} {llhttp}; "
            f"of {accepted + refused.total()} valid ones {accepted} answered",
            *[f"answered: {each}: {corpus.ANSWERED[each]}" for each in let_through],
            *[f"refused, {count} x: {reason}: {corpus.REFUSED[reason]}" for reason, count in refused.most_common()],
        ]
    )
