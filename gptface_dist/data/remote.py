"""Read whole files over http(s), with retries and a check of their size."""

import email.utils
import http.client
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import BinaryIO

ATTEMPTS = 4
TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.5


class Refused(OSError):
    """The server refuses the file (4xx), or the URL is impossible; a retry cannot help."""


def is_url(location: str) -> bool:
    """Whether a location is read over the network."""
    return location.startswith(("http://", "https://"))


def join(base: str, name: str) -> str:
    """The file ``name`` under ``base``; a name that is a URL itself stays."""
    return name if is_url(name) else f"{base.rstrip('/')}/{urllib.parse.quote(name)}"


def file_name(name: str) -> str:
    """The last component of a file's name or URL, without a URL's query."""
    return urllib.parse.urlsplit(name).path.rsplit("/", 1)[-1] if is_url(name) else name


def _quoted(url: str) -> str:
    """The URL with spaces and non-ASCII letters escaped; existing escapes are kept."""
    return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def download(url: str) -> BinaryIO:
    """The whole file at ``url`` as an anonymous temporary file, positioned at its start.

    Raises :class:`OSError` after :data:`ATTEMPTS` failures, :class:`Refused` at once where the server refuses (4xx except
    408 and 429).
    """
    pause = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller
        try:
            with urllib.request.urlopen(_quoted(url), timeout=TIMEOUT_S) as response:
                expected = response.headers.get("Content-Length")
                got = 0
                while part := response.read(1 << 20):
                    file.write(part)
                    got += len(part)
            if expected is not None and got != int(expected):
                raise OSError(f"{got} of {expected} bytes arrived")
            file.seek(0)
            return file
        except (OSError, http.client.HTTPException, ValueError) as error:
            file.close()
            if _is_final(error):
                raise Refused(f"{url} cannot be read: {error}") from None
            if attempt == ATTEMPTS:
                raise OSError(f"{url} cannot be read after {ATTEMPTS} attempts: {error}") from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether a retry cannot help: an impossible URL, or a refusal other than 408 and 429."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)
    return isinstance(error, ValueError | http.client.InvalidURL)


def read(url: str) -> bytes:
    """The bytes of the file at ``url``, in memory; errors as for :func:`download`."""
    with download(url) as file:
        return file.read()


def size_and_time(url: str) -> tuple[int, float] | None:
    """Size in bytes and time of last change (seconds since 1970) of a file; None where the server does not report them."""
    request = urllib.request.Request(_quoted(url), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            changed = email.utils.parsedate_to_datetime(response.headers["Last-Modified"])
            return int(response.headers["Content-Length"]), changed.timestamp()
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None
