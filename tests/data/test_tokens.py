"""Token samples: arrays as numpy reads them, everything else refused; sources of other tokenizers refused."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.data import tokens
from gptface_dist.data.folder import Unreadable
from gptface_dist.data.shards import write_index
from gptface_dist.errors import UserError
from tests.corpus import GRID, VOCABULARY, source, write_tokens
from tests.picture_shards import write_pictures

CODES = np.arange(24).reshape(GRID)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@given(st.lists(st.lists(st.integers(0, VOCABULARY.text_size - 1), min_size=1, max_size=20), min_size=1, max_size=4))
def test_round_trip(captions: list[list[int]]) -> None:
    members = tokens.encode(CODES, captions)
    read = np.load(io.BytesIO(members[tokens.CODES]))
    assert (read.dtype, read.tolist()) == (np.uint16, CODES.tolist())
    found = tokens.TokenDecoder(VOCABULARY, GRID).decode(members[tokens.CODES], members[tokens.CAPTIONS])
    assert found.codes.tolist() == CODES.tolist()
    assert [found.caption(number).tolist() for number in range(len(captions))] == captions


@pytest.mark.parametrize("captions", [[], [[]], [[1], []], [[1, -1]]])
def test_captions_without_ids_are_not_written(captions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="caption"):
        tokens.encode(CODES, captions)


@pytest.mark.parametrize("codes", [np.zeros(3), np.zeros((0, 3)), np.full((2, 2), 65536), np.full((2, 2), -1)])
def test_codes_that_do_not_fit_are_not_written(codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="codes"):
        tokens.encode(codes, [[1]])


FINE = {"codes": npy(CODES.astype(np.uint16)), "captions": npy(np.array([[1, 2, -1]], np.int32))}


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": b""},
        {"codes": b"\x93NUMPY\x01\x00\xff\xff{"},
        {"codes": FINE["codes"][:-1]},
        {"codes": FINE["codes"] + b"\0"},
        {"codes": FINE["codes"].replace(b"descr", b"desc\n")},
        {"codes": FINE["codes"].replace(b"(4, 6)", b"(4, 6 ")},
        {"codes": npy(CODES)},
        {"codes": npy(CODES.astype(">u2"))},
        {"codes": npy(np.asfortranarray(CODES.astype(np.uint16)))},
        {"codes": npy(CODES.astype(np.uint16)[:3])},
        {"codes": npy(CODES.astype(np.uint16) + 64)},
        {"codes": npy(np.array([["a"]], object))},
        {"captions": npy(np.array([[1, 2]], np.int64))},
        {"captions": npy(np.array([1, 2], np.int32))},
        {"captions": npy(np.array([[300]], np.int32))},
        {"captions": npy(np.array([[-1]], np.int32))},
        {"captions": npy(np.array([[1, -1, 2]], np.int32))},
        {"captions": npy(np.array([[1, -2]], np.int32))},
        {"captions": npy(np.zeros((0, 4), np.int32))},
    ],
)
def test_everything_else_is_unreadable(wrong: dict[str, bytes]) -> None:
    decoder = tokens.TokenDecoder(VOCABULARY, GRID)
    decoder.decode(FINE["codes"], FINE["captions"])
    members = {**FINE, **wrong}
    with pytest.raises(Unreadable):
        decoder.decode(members["codes"], members["captions"])


def test_without_a_vocabulary_the_form_is_checked_alone() -> None:
    decoder = tokens.TokenDecoder(None)
    decoder.decode(npy(np.full((2, 2), 65535, np.uint16)), npy(np.array([[2**31 - 2]], np.int32)))
    with pytest.raises(Unreadable):
        decoder.decode(npy(CODES), FINE["captions"])


def test_sources_of_other_tokenizers_are_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [3])
    assert tokens.check_sources([source(tmp_path / "a")], VOCABULARY) == GRID
    for name in ("text", "image"):
        other = dataclasses.replace(VOCABULARY, **{f"{name}_sha256": "c" * 64})
        ours = {"text": "aaaaaaaaaaaa", "image": "bbbbbbbbbbbb"}[name]
        with pytest.raises(UserError, match=f"{name} tokenizer {ours}, the vocabulary has cccccccccccc"):
            tokens.check_sources([source(tmp_path / "a")], other)


def test_sources_that_are_no_tokens_or_of_two_grids_are_refused(tmp_path: Path) -> None:
    for name in "abc":
        write_tokens(tmp_path / name, [3])
    write_index(tmp_path / "b", tokens.KIND, tokens.index_meta(VOCABULARY, (2, 12)), [tmp_path / "b" / "00000.tar"])
    with pytest.raises(UserError, match=r"4x6, .*b has 2x12"):
        tokens.check_sources([source(tmp_path / "a"), source(tmp_path / "b")], VOCABULARY)
    for grid in ("x", [1], [0, 2], None):
        meta = {**tokens.index_meta(VOCABULARY, GRID), "grid": grid}
        write_index(tmp_path / "c", tokens.KIND, meta, [tmp_path / "c" / "00000.tar"])
        with pytest.raises(UserError, match="no grid of codes"):
            tokens.check_sources([source(tmp_path / "c")], VOCABULARY)
    write_pictures(tmp_path / "d", [1])
    with pytest.raises(UserError, match="holds pictures, not tokens"):
        tokens.check_sources([source(tmp_path / "d")], VOCABULARY)
    with pytest.raises(UserError, match="no sources"):
        tokens.check_sources([], VOCABULARY)
