"""Reading shards over http(s): a few retries, and whole files checked by size before they are used."""

import http.client
import tempfile
import time
import urllib.error
import urllib.request
from typing import BinaryIO

ATTEMPTS = 4
TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.5


def is_url(location: str) -> bool:
    """Whether a location is read over the network."""
    return location.startswith(("http://", "https://"))


def join(base: str, name: str) -> str:
    """``name`` under ``base``; a name that is a URL itself stays."""
    return name if is_url(name) else f"{base.rstrip('/')}/{name}"


def download(url: str) -> BinaryIO:
    """The whole file at ``url`` as an anonymous temporary file, positioned at its start.

    Raises :class:`OSError` when it cannot be had after a few attempts; a missing file (4xx) is not asked for twice.
    """
    pause = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                expected = response.headers.get("Content-Length")
                got = 0
                while part := response.read(1 << 20):
                    file.write(part)
                    got += len(part)
            if expected is not None and got != int(expected):
                raise OSError(f"{url}: {got} of {expected} bytes arrived")
            file.seek(0)
            return file
        except (OSError, http.client.HTTPException) as error:
            file.close()
            final = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if final or attempt == ATTEMPTS:
                raise OSError(f"{url} cannot be read: {error}") from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def read(url: str) -> bytes:
    """The content of a small file."""
    with download(url) as file:
        return file.read()
