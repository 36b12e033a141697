"""Picture shards for tests: small pictures with known content, damaged copies of them, and a server for them."""

import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gptface_dist.data.shards import ShardWriter, write_index


def png(seed: int, size: int = 12) -> bytes:
    """A small picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Key and members of sample ``number``."""
    return f"{number:09d}", {"png": png(number), "txt": f"face {number}".encode(), "json": b'{"captions": ["one more"]}'}


def write_pictures(folder: Path, shards: list[int]) -> dict[str, dict[str, bytes]]:
    """Indexed picture shards with the given numbers of samples; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for shard, count in enumerate(shards):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in range(len(held), len(held) + count):
                key, members = sample(number)
                writer.write(key, members)
                held[key] = members
    write_index(folder, "pictures", {}, sorted(folder.glob("*.tar")))
    return held


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.path)
        answers = server.answers.get(self.path, [])
        if answers:
            answer = answers.pop(0)
            if isinstance(answer, int):
                self.send_error(answer)
            else:  # fewer bytes than promised
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer) + 100))
                self.end_headers()
                self.wfile.write(answer)
            return
        super().do_GET()


class Server(http.server.ThreadingHTTPServer):
    """A folder over http, with wrong answers where they are asked for."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=str(folder)))
        self.answers: dict[str, list[int | bytes]] = {}
        """Path -> answers that come before the right one: a status, or the bytes after which the connection is cut."""
        self.asked: list[str] = []
        """All paths asked for."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder while the context lasts."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
