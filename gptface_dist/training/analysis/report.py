"""HTML report of a run in one self-contained file: results, loss curves, pictures and texts."""

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.training.analysis import curves
from gptface_dist.training.metrics import ACCURACY, CONSTANT_GUESS, LOSS, read_metrics, terms

WIDTH = 640
"""Largest width in pixels to which small pictures are enlarged."""
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
h1, h2 {{ font-weight: 600; }} h2 {{ margin-top: 2em; }}
img {{ max-width: 100%; }} .enlarged {{ image-rendering: pixelated; }}
pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em 1em .2em 0; text-align: right; }} td:first-child {{ text-align: left; }}
</style>
<h1>{title}</h1>
{body}
"""


@dataclass(frozen=True)
class Section:
    """A heading over one file, shown as a picture or quoted as text."""

    title: str
    """Heading of the section."""
    path: Path
    """File to embed; the suffix tells pictures from texts."""

    @classmethod
    def parse(cls, text: str) -> "Section":
        """Parse ``TITLE=PATH``; :class:`UserError` for any other form."""
        title, equals, path = text.partition("=")
        if not (title and equals and path):
            raise UserError(f"section {text!r} is not of the form TITLE=PATH")
        return cls(title, Path(path))


def write(out: Path, title: str, run: Path, sections: Sequence[Section]) -> None:
    """Write the page to ``out``. :class:`UserError` names a missing or broken file; ``out`` is not written then."""
    body = [_results(run), f"<h2>Losses</h2>\n{_curves(run)}"]
    for section in sections:
        shown = (
            _picture(section.path) if section.path.suffix.lower() in KINDS else f"<pre>{html.escape(_text(section.path))}</pre>"
        )
        body.append(f"<h2>{html.escape(section.title)}</h2>\n{shown}")
    write_atomically(out, PAGE.format(title=html.escape(title), body="\n".join(body)))


def _results(run: Path) -> str:
    """Training speed, and the last evaluation beside the best constant guess."""
    held_out, train = read_metrics(run, "evaluation"), read_metrics(run)
    if not train:
        raise UserError(f"{run} has no training step yet")
    tokens, seconds = (sum(record[name] for record in train) for name in ("tokens", "seconds"))
    lines = [f"<p>{len(train)} steps, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s.</p>"]
    if held_out:
        last = held_out[-1]
        rows = ["<tr><td>held out<th>loss (nats)<th>constant guess<th>right</tr>"]
        for name in terms([last]):
            guess = f"{last[CONSTANT_GUESS + name]:.3f}" if CONSTANT_GUESS + name in last else ""
            rows.append(f"<tr><td>{name}<td>{last[LOSS + name]:.3f}<td>{guess}<td>{last[ACCURACY + name]:.1%}</tr>")
        lines.append("<table>" + "".join(rows) + "</table>")
    return "\n".join(lines)


def _curves(run: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        curves.draw([run], path)
        return _picture(path)


def _picture(path: Path) -> str:
    """``img`` element of a picture; a small one is enlarged by a whole factor."""
    data = _bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            times = max(1, WIDTH // opened.width)
            size = f'width="{opened.width * times}"' + (' class="enlarged"' if times > 1 else "")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture") from None
    source = f"data:{KINDS[path.suffix.lower()]};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(path.name)}" {size} src="{source}">'


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", errors="replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read for the report: {error.strerror}") from None
