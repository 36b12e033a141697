"""The records of a folder as plain text that fits the end of a terminal's or a log's memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gptface_dist.benchmarks.gpu.verdict import Result, right

MOST = 12_000
"""Characters of the whole table."""
WIDTH = 160
"""Characters of a line."""
OWN = ("begin", "end", "check", "failed", "left out")
"""Kinds of records that are no measurements."""
DETAILS = ("trial",)
"""Kinds of which there are hundreds; another record sums them up, and they stand in gpu.json."""
SHORTER = (1000, 100, 80, 60, 50, 40, 30, 24, 18, 12, 8, 5, 3, 1)
"""Rows of each list, tried in this order until the whole fits."""


def table(results: Sequence[Result], asked: Sequence[Result] | None = None) -> str:
    """What is recorded of these tasks: how each ended, what was wrong, every measurement, and the verdict in the last line.

    Args:
        results: everything that the folder holds.
        asked: those that decide the verdict; None for all.
    """
    head = [*_origins(results), *_aligned([_task(result) for result in results])]
    names = {result.task.name for result in results if asked is not None} - {result.task.name for result in asked or ()}
    others = [result for result in results if result.task.name in names and result.problems]
    tail = [f"from an earlier call: {_problems(others)}"[:WIDTH]] if others else []
    tail.append(verdict(results if asked is None else asked))
    text = ""
    for rows in SHORTER:
        body = [line for section in _sections(results) for line in _shortened(section, rows)]
        text = "\n".join([*head, *(line[:WIDTH] for line in body), "", *tail])
        if len(text) <= MOST:
            return text
    end = "\n".join(tail)
    return f"{text[: MOST - len(end) - 5]}\n...\n{end}"


def verdict(results: Sequence[Result]) -> str:
    """The exit status in words."""
    if not right(results):
        return f"NOT RIGHT: {_problems(results)}"[:WIDTH]
    checks = sum(len(result.checks) for result in results)
    dry = "; a dry run: no figure of it is a measurement" if any(result.origin.get("dry") for result in results) else ""
    out = sum(len(result.of("left out")) for result in results)
    return f"{f'all right: {checks} checks' if checks else 'nothing was checked'}{f', {out} left out' if out else ''}{dry}"


def _problems(results: Sequence[Result]) -> str:
    return "; ".join(f"{result.task.name}: {', '.join(result.problems)}" for result in results if result.problems)


def _origins(results: Sequence[Result]) -> Iterator[str]:
    """Versions and commits of all records; a warning where they are of several machines or states of the code."""
    found: dict[str, None] = {}
    devices = {(result.origin["device"], result.origin.get("dry")) for result in results if "device" in result.origin}
    for result in results:
        origin = result.origin
        if origin:
            versions = " ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items())
            found[f"commit {origin.get('commit') or 'unknown'}; {versions}"] = None
    yield from found
    if len(devices) > 1:
        yield f"of {len(devices)} devices: do not compare the figures of one with those of another"
    elif len(found) > 1:
        yield "of several commits or versions: parts that were measured apart may differ for that"


def _task(result: Result) -> list[str]:
    """Name, what became of it, time, checks, date, device."""
    end, origin = result.end or {"how": "no end recorded"}, result.origin
    seconds = f"{end['at']:.0f} s" if isinstance(end.get("at"), int | float) else ""
    checks = f"{len(result.checks) - len(result.wrong)}/{len(result.checks)} ok" if result.checks else ""
    counts = [checks, *(f"{len(result.of(kind))} {kind}" for kind in ("failed", "left out") if result.of(kind))]
    counts += [f"{result.file.damaged} unreadable"] if result.file.damaged else []
    date, device = str(origin.get("date", ""))[:16], f"{origin.get('device', '')}{', dry run' if origin.get('dry') else ''}"
    return [result.task.name, str(end.get("how")), seconds, ", ".join(filter(None, counts)), date, device, _worst(result)]


def _worst(result: Result) -> str:
    """Of each checked quantity the value that is nearest to its limit."""
    worst: dict[str, tuple[float, float]] = {}
    for check in result.checks:
        for name, (value, limit) in check.get("measured", {}).items():
            # NaN is a word in the record; it is listed among what failed.
            if isinstance(value, int | float) and (name not in worst or value / limit > worst[name][0] / worst[name][1]):
                worst[name] = (value, limit)
    return " ".join(f"{name} {number(value)}<{number(limit)}" for name, (value, limit) in worst.items())


def _sections(results: Sequence[Result]) -> Iterator[list[str]]:
    """Lists of lines, each with a heading: what was wrong, what failed, what was left out, then measurements by kind."""
    yield _listed("checks that failed", ((result, _broken(one)) for result in results for one in result.wrong))
    for kind in ("failed", "left out"):
        lines = ((result, f"{_words(one.get('about', {}))}: {one.get('why')}") for result in results for one in result.of(kind))
        yield _listed(kind, lines)
    for part, group in groupby(results, key=lambda result: result.task.part.name):
        records = [one for result in group for one in result.file.records if one["kind"] not in (*OWN, *DETAILS)]
        for kind in dict.fromkeys(one["kind"] for one in records):
            yield _measurements(part, kind, [one for one in records if one["kind"] == kind])


def _listed(heading: str, lines: Iterable[tuple[Result, str]]) -> list[str]:
    found = [f"{result.task.name}: {line}" for result, line in lines]
    return ["", f"== {heading}: {len(found)}", *found] if found else []


def _broken(check: Mapping[str, Any]) -> str:
    """What of a check does not hold."""
    over = []
    for name, (value, limit) in check.get("measured", {}).items():
        # NaN is a word in the record, and more than any limit.
        if isinstance(value, str) or not value <= limit:
            over.append(f"{name} {number(value)} > {number(limit)}")
    over += [f"not: {name}" for name, holds in check.get("holds", {}).items() if not holds]
    return f"{_words(check.get('about', {}))}: {', '.join(over)}"


def _measurements(part: str, kind: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of one kind; fields that are the same in all of them stand in the heading."""
    fields = list(dict.fromkeys(name for one in records for name in one if name not in ("kind", "at")))
    values = {name: [_cell(one.get(name)) for one in records] for name in fields}
    same = {name: cells[0] for name, cells in values.items() if len(records) > 1 and len(set(cells)) == 1}
    columns = [name for name in fields if name not in same and any(values[name])]
    rows = _aligned([columns, *zip(*(values[name] for name in columns), strict=True)])
    constant = ", ".join(f"{name} {cell}" for name, cell in same.items() if cell)
    title = part if kind == part else f"{part}, {kind}"
    return ["", f"== {title}{f': {constant}' if constant else ''}", *rows]


def _shortened(section: Sequence[str], rows: int) -> list[str]:
    """A section with at most so many lines below its empty line and heading."""
    if len(section) <= rows + 2:
        return list(section)
    return [*section[: rows + 2], f"... {len(section) - rows - 2} more in gpu.json"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of equal width; numbers to the right."""
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _padded(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() or cell[:1] == "-" else cell.ljust(width)


def _words(about: Mapping[str, Any]) -> str:
    """What a record is about: words as they are, numbers with their names, switches by name where they are on."""
    found = []
    for name, value in about.items():
        if isinstance(value, bool):
            found += [name] if value else []
        elif isinstance(value, str):
            found.append(value)
        else:
            found.append(f"{name} {_cell(value)}")
    return " ".join(found)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "/".join(_cell(one) for one in value)
    return str(value) if isinstance(value, bool | str) else number(value)


def number(value: Any) -> str:
    """Whole numbers as they are, others with three digits; what is no number as it stands."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)
