"""Samples of token shards: image codes and tokenized captions.

A token shard is a tar like any other: ``key.codes.npy`` (uint16 ``[H, W]``, codes of the image tokenizer) and
``key.captions.npy`` (int32 ``[captions, longest]``, ids of the text tokenizer, rows filled up with -1).
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy

from gptface_dist.data.folder import Unreadable
from gptface_dist.data.shards import Index
from gptface_dist.data.stream import RawSample, Source
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import Vocabulary

KIND = "tokens"
CODES = "codes.npy"
CAPTIONS = "captions.npy"


@dataclass(frozen=True)
class TokenSample:
    """A tokenized picture with its captions."""

    codes: np.ndarray
    """uint16 [H, W]: codes of the picture, 0 .. image_codes - 1."""
    captions: np.ndarray
    """int32 [captions, longest]: text ids, rows filled up with -1."""

    def caption(self, number: int) -> np.ndarray:
        """int32 [length]: the ids of one caption."""
        row = self.captions[number]
        return row[row >= 0]


def encode(codes: np.ndarray, captions: Sequence[Sequence[int]]) -> dict[str, bytes]:
    """The members of a token sample; ``codes`` is any integer [H, W], ``captions`` at least one list of at least one id."""
    if not captions or not all(map(len, captions)) or min(map(min, captions)) < 0:
        raise ValueError("a token sample needs captions, each of at least one id, none negative")
    if codes.ndim != 2 or codes.size == 0 or codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"codes must be [H, W] within uint16, got {codes.dtype} {codes.shape}")
    table = np.full((len(captions), max(map(len, captions))), -1, dtype=np.int32)
    for row, caption in zip(table, captions, strict=True):
        row[: len(caption)] = caption
    return {CODES: _to_npy(codes.astype(np.uint16)), CAPTIONS: _to_npy(table)}


class TokenDecoder:
    """Decodes samples of token shards and checks dtypes, shapes and ids.

    Args:
        vocabulary: every id must lie in its ranges; None leaves the upper ends unchecked (for checks of shards alone).
        grid: rows and columns that the codes must have; None for any.
    """

    def __init__(self, vocabulary: Vocabulary | None, grid: tuple[int, int] | None = None):
        self._image_codes = vocabulary.image_codes if vocabulary else np.iinfo(np.uint16).max + 1
        self._text_size = vocabulary.text_size if vocabulary else np.iinfo(np.int32).max
        self._grid = grid

    def __call__(self, raw: RawSample) -> TokenSample:
        """Read and decode one sample; :class:`Unreadable` where a member is missing or malformed."""
        return self.decode(raw.read(CODES), raw.read(CAPTIONS))

    def decode(self, codes_npy: bytes, captions_npy: bytes) -> TokenSample:
        """Decode the bytes of both members; :class:`Unreadable` where they violate the format."""
        codes, captions = _from_npy(codes_npy), _from_npy(captions_npy)
        if codes.ndim != 2 or codes.dtype != np.uint16 or codes.size == 0 or codes.max() >= self._image_codes:
            raise Unreadable(f".{CODES} is not uint16 [H, W] below {self._image_codes}")
        if self._grid is not None and codes.shape != self._grid:
            raise Unreadable(f".{CODES} is {codes.shape[0]}x{codes.shape[1]}, not {self._grid[0]}x{self._grid[1]}")
        if captions.ndim != 2 or captions.dtype != np.int32 or captions.size == 0 or captions.max() >= self._text_size:
            raise Unreadable(f".{CAPTIONS} is not int32 [captions, longest] below {self._text_size}")
        filled = captions < 0
        # Every row: at least one id, then -1 to its end and nothing else below 0.
        if captions.min() < -1 or filled[:, 0].any() or (filled[:, :-1] > filled[:, 1:]).any():
            raise Unreadable(f".{CAPTIONS} has a row that is not ids followed by -1")
        return TokenSample(codes, captions)


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@functools.lru_cache(maxsize=256)
def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    shape, fortran, dtype = npy.read_array_header_1_0(io.BytesIO(data[npy.MAGIC_LEN :]))
    if fortran or dtype.hasobject:
        raise ValueError("not a plain C-ordered array")
    return shape, dtype


def _from_npy(data: bytes) -> np.ndarray:
    """``np.load`` for plain version-1 arrays. Most of the time goes into the headers, which repeat and are cached."""
    try:
        if data[: npy.MAGIC_LEN] != npy.magic(1, 0):
            raise ValueError("not a version 1 .npy file")
        start = npy.MAGIC_LEN + 2 + int.from_bytes(data[npy.MAGIC_LEN : npy.MAGIC_LEN + 2], "little")
        shape, dtype = _header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    # numpy's header parser raises ValueError, SyntaxError, TokenError, TypeError, ...
    except Exception as error:
        raise Unreadable(f"not a readable array: {error}") from None


def index_meta(vocabulary: Vocabulary, grid: tuple[int, int], **more: Any) -> dict[str, Any]:
    """``meta`` of a token index: the tokenizers' hashes, the vocabulary's sizes, the grid of codes, and ``more``."""
    return {**asdict(vocabulary), "grid": list(grid), **more}


def read_grid(meta: dict[str, Any], location: str) -> tuple[int, int]:
    """Rows and columns of the codes, from the index of token shards at ``location``."""
    match meta.get("grid"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise UserError(f"the index of {location} names no grid of codes: make the shards with `gptface data tokenize`")


def recorded_vocabulary(meta: dict[str, Any]) -> Vocabulary | None:
    """The vocabulary that the index of token shards names; None where it does not (:class:`UserError` where it is none)."""
    names = ("text_size", "image_codes", "text_sha256", "image_sha256")
    return Vocabulary(**{name: meta[name] for name in names}) if all(name in meta for name in names) else None


def check_made_with(index: Index, location: str, vocabulary: Vocabulary) -> None:
    """:class:`UserError` where other tokenizers made the token shards; it names both."""
    for name, ours in (("text", vocabulary.text_sha256), ("image", vocabulary.image_sha256)):
        theirs = index.meta.get(f"{name}_sha256")
        if theirs != ours:
            raise UserError(
                f"{location} was made with {name} tokenizer {str(theirs)[:12]}, the vocabulary has {ours[:12]}: "
                f"tokenize again, or use the tokenizers that made it"
            )


def check_sources(sources: Sequence[Source], vocabulary: Vocabulary) -> tuple[int, int]:
    """The grid (rows, columns) that all sources share; refuses sources that other tokenizers made, naming both."""
    if not sources:
        raise UserError("no sources of data: give at least one folder of token shards")
    grids: dict[tuple[int, int], str] = {}
    for source in sources:
        index, location = source.folder.index, source.folder.location
        if index.kind != KIND:
            raise UserError(f"{location} holds {index.kind}, not tokens: make them with `gptface data tokenize`")
        check_made_with(index, location, vocabulary)
        grids[read_grid(index.meta, location)] = location
    if len(grids) != 1:
        raise UserError(
            "sources with different grids of codes: " + ", ".join(f"{w} has {g[0]}x{g[1]}" for g, w in grids.items())
        )
    return next(iter(grids))
