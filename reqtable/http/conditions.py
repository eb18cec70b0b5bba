"""Conditional requests (RFC 9110, 13) and ranges (RFC 9110, 14): what they ask for, by the header fields alone."""

from __future__ import annotations

import calendar
import re
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from typing import NamedTuple

RANGES_MAX = 16  # ranges in one request; with more, the whole file is sent

_TAG = re.compile(r'[ \t]*((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")[ \t]*(?:,|$)|[ \t]*,')
_RANGE = re.compile(r"([0-9]{0,1000})-([0-9]{0,1000})")  # int() refuses a number of more than 4300 digits
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DATES = [
    re.compile(text, re.IGNORECASE)
    for text in (
        r"[a-z]{3}, (?P<day>\d\d) (?P<month>[a-z]{3}) (?P<year>\d{4}) (?P<time>\d\d:\d\d:\d\d) GMT",
        r"[a-z]{6,9}, (?P<day>\d\d)-(?P<month>[a-z]{3})-(?P<year>\d\d) (?P<time>\d\d:\d\d:\d\d) GMT",
        r"[a-z]{3} (?P<month>[a-z]{3}) (?P<day>[ \d]\d) (?P<time>\d\d:\d\d:\d\d) (?P<year>\d{4})",
    )
]


class Validators(NamedTuple):
    """Identifies one version of a file: its entity tag, which is strong, and when it was modified."""

    tag: str
    modified: int  # seconds
    now: int  # when the answer is made


class Range(NamedTuple):
    """Part of a file, in bytes."""

    start: int
    length: int

    def content_range(self, size: int) -> str:
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


@lru_cache(maxsize=1024)
def http_date(seconds: int) -> str:
    """Return a time as header fields have it."""
    return formatdate(seconds, usegmt=True)


def seconds_of(date: str) -> int | None:
    """Return the time in a header field; None if it is none (RFC 9110, 5.6.7)."""
    for form in _DATES:
        found = form.fullmatch(date.strip(" \t"))
        if found is None:
            continue
        month = found["month"].lower()
        hour, minute, second = map(int, found["time"].split(":"))
        year, day = int(found["year"]), int(found["day"])
        if len(found["year"]) == 2:
            year += 2000 if year < 70 else 1900
        is_right = month in _MONTHS and 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60 and year
        return calendar.timegm((year, _MONTHS.index(month) + 1, day, hour, minute, second)) if is_right else None
    return None


def precondition(given: Mapping[str, str], version: Validators) -> int | None:
    """Return 304 or 412 if a condition of a GET or HEAD says so, in the order of RFC 9110, 13.2.2; else None."""
    if (wanted := given.get("if-match")) is not None:
        if not _has(wanted, version.tag, weak=False):
            return 412
    elif (date := given.get("if-unmodified-since")) is not None:
        at = seconds_of(date)
        if at is not None and version.modified > at:
            return 412
    if (known := given.get("if-none-match")) is not None:
        if _has(known, version.tag, weak=True):
            return 304
    elif (date := given.get("if-modified-since")) is not None:
        at = version.modified if date == http_date(version.modified) else seconds_of(date)
        if at is not None and version.modified <= at:
            return 304
    return None


def ranges_of(given: Mapping[str, str], version: Validators, size: int) -> list[Range] | None:
    """Return the ranges of a file that a GET asks for; []: none of them is in the file; None: send the whole file.

    The whole file is sent if the header is not understood, if `If-Range` names another version, and if the ranges are
    more than `RANGES_MAX` or would send more than the file has. An empty file has no ranges.
    """
    wanted = given.get("range")
    if wanted is None or not size or not _is_version(given.get("if-range"), version):
        return None
    unit, equals, text = wanted.partition("=")
    if unit.strip(" \t").lower() != "bytes" or not equals:
        return None
    specs = [spec for each in text.split(",") if (spec := each.strip(" \t"))]
    if not 1 <= len(specs) <= RANGES_MAX:
        return None
    ranges = []
    for spec in specs:
        found = _RANGE.fullmatch(spec)
        if found is None or spec == "-" or (found[1] and found[2] and int(found[1]) > int(found[2])):
            return None
        if not found[1]:
            length = min(int(found[2]), size)
            start = size - length
        else:
            start = int(found[1])
            length = min(int(found[2]) + 1 if found[2] else size, size) - start
        if length > 0:
            ranges.append(Range(start, length))
    return None if sum(each.length for each in ranges) > size else ranges


def _is_version(wanted: str | None, version: Validators) -> bool:
    """Return whether `If-Range` names this version. Only what is strong names a version (RFC 9110, 13.1.5)."""
    if wanted is None:
        return True
    if '"' in wanted:
        return wanted.strip(" \t") == version.tag
    # A date of this very second is weak: the file may change again within the second.
    return seconds_of(wanted) == version.modified < version.now


def _has(field: str, tag: str, weak: bool) -> bool:
    """Return whether a list of entity tags has `tag`, which is strong. A list that is not well-formed has none."""
    if field.strip(" \t") == "*":
        return True
    at, found = 0, False
    while at < len(field):
        match = _TAG.match(field, at)
        if match is None:
            return False
        found = found or match[1] == tag or (weak and match[1] == "W/" + tag)
        at = match.end()
    return found
