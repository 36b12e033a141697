"""The joint id space: its arithmetic, its file, and the hashes that tie it to two tokenizers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.files import sha256
from gptface_dist.tokenizers.image_files import CONFIG_NAME, image_sha256, weights_path
from gptface_dist.tokenizers.text import TextOptions, train_text_tokenizer
from gptface_dist.tokenizers.vocabulary import IMAGE_NAME, TEXT_NAME, VOCABULARY_NAME, Vocabulary, join, verify
from tests.vqmodels import small_model

TINY = Vocabulary(text_size=5, image_codes=3, text_sha256="a" * 64, image_sha256="0" * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_text_tokenizer([f"face number {number}" for number in range(40)], tmp_path / TEXT_NAME, TextOptions(size=278))
    small_model(codes=7).save_pretrained(tmp_path / IMAGE_NAME)
    return tmp_path


def test_ids_by_hand() -> None:
    assert (list(TINY.text_range), list(TINY.image_range)) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert (TINY.pad_id, TINY.cls_id, TINY.sep_id, TINY.mask_id, TINY.size) == (8, 9, 10, 11, 12)
    assert TINY.image_offset == 5


@settings(deadline=None)
@given(st.integers(1, 1 << 20), st.integers(1, 1 << 16))
def test_every_id_has_one_meaning(text_size: int, image_codes: int) -> None:
    vocabulary = replace(TINY, text_size=text_size, image_codes=image_codes)
    assert vocabulary.text_range.start == 0
    assert vocabulary.image_range.start == vocabulary.text_range.stop == vocabulary.image_offset
    assert (len(vocabulary.text_range), len(vocabulary.image_range)) == (text_size, image_codes)
    specials = [vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]
    assert sorted(specials) == list(range(vocabulary.image_range.stop, vocabulary.size))


def test_a_file_says_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    TINY.save(path)
    assert Vocabulary.load(path) == TINY
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "has the format 'other'"),
        ({"size": 13}, "says 13 ids"),
        ({"specials": ["[PAD]"]}, "its parts make 12"),
        ({"text_size": "5"}, "text_size must be a positive whole number, not '5'"),
        ({"text_size": True}, "text_size must be a positive whole number, not True"),
        ({"image_codes": 0}, "image_codes must be a positive whole number, not 0"),
        ({"image_sha256": "xyz"}, "image_sha256 must be 64 hexadecimal digits"),
        ({"text_sha256": None}, "text_sha256 must be 64 hexadecimal digits"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "vocabulary.json"
    TINY.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="gptface tokenizer join") as caught:
        Vocabulary.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"format": "gptface-vocabulary-1"}'])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no vocabulary"):
        Vocabulary.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary.json does not exist: make it with `gptface tokenizer join"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_join_counts_and_hashes_both_tokenizers(folder: Path) -> None:
    made = join(folder)
    assert (made.text_size, made.image_codes) == (278, 7)
    assert (made.text_sha256, made.image_sha256) == (sha256(folder / TEXT_NAME), image_sha256(folder / IMAGE_NAME))
    assert Vocabulary.load(folder / VOCABULARY_NAME) == verify(folder) == join(folder) == made


@pytest.mark.parametrize("missing", [TEXT_NAME, f"{IMAGE_NAME}/{CONFIG_NAME}", f"{IMAGE_NAME}/{weights_path(Path()).name}"])
def test_join_and_verify_name_a_missing_tokenizer(folder: Path, missing: str) -> None:
    join(folder)
    (folder / missing).unlink()
    for function in (join, verify):
        with pytest.raises(UserError, match=missing.rpartition("/")[2]) as caught:
            function(folder)
        assert "\n" not in str(caught.value)


def test_verify_names_both_hashes(folder: Path) -> None:
    made = join(folder)
    weights = weights_path(folder / IMAGE_NAME)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert made.image_sha256 in str(caught.value)
    assert image_sha256(folder / IMAGE_NAME) in str(caught.value)
    assert image_sha256(folder / IMAGE_NAME) != made.image_sha256
    (folder / TEXT_NAME).write_bytes(b"other")
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert made.text_sha256 in str(caught.value)
    assert sha256(folder / TEXT_NAME) in str(caught.value)


def test_join_does_not_replace_a_vocabulary_of_others(folder: Path) -> None:
    made = join(folder)
    small_model(codes=9).save_pretrained(folder / IMAGE_NAME)
    with pytest.raises(UserError, match="was made from other tokenizers"):
        join(folder)
    assert Vocabulary.load(folder / VOCABULARY_NAME) == made


def test_identity_is_of_what_changes_codes(folder: Path) -> None:
    image = folder / IMAGE_NAME
    before = image_sha256(image)
    config = json.loads((image / CONFIG_NAME).read_text())
    (image / CONFIG_NAME).write_text(json.dumps(dict(reversed({**config, "_diffusers_version": "0.0.1"}.items()))))
    assert image_sha256(image) == before
    (image / CONFIG_NAME).write_text(json.dumps({**config, "norm_type": "spatial"}))
    assert image_sha256(image) != before
