"""Files of records: a line of JSON each, on disk before the next one is computed.

Whoever writes may be killed at any time: what a file held before stays, and at most its last line is damaged.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """What a file of records holds."""

    records: list[dict[str, Any]]
    """In the order of their writing."""
    damaged: int = 0
    """Lines that cannot be read: of a writer that was killed within them, or of a bad disk."""


def append(path: Path, record: Record) -> None:
    """Add a record, flushed to disk. A damaged last line stays a line of its own."""
    line = (json.dumps(_plain(record), default=str) + "\n").encode()
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Recorded:
    """What can be read of a file; of none, nothing."""
    if not path.exists():
        return Recorded([])
    records, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        # Not only JSON's own error: a damaged line need not be text.
        except ValueError:
            damaged += bool(line)
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
        else:
            damaged += 1
    return Recorded(records, damaged)


def _plain(value: Any) -> Any:
    """The value with numbers that JSON does not have (NaN, infinity) as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
