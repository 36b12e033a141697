"""The text tokenizer: exact round trips, the same file for the same captions, and mistakes in one line."""

import pickle
import random
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.text import LONGEST_LINE, TextOptions, TextTokenizer, normalise, train_text_tokenizer

ANY = st.text(st.characters(exclude_categories=()))
"""Any string of Python, lone surrogates among them."""


def captions(count: int = 200) -> list[str]:
    """Sentences of many made-up words, so that there is something to learn, and of a few real ones."""
    rng = random.Random(0)
    syllables = ["ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu"]
    words = ["woman", "brown", "hair", *("".join(rng.choices(syllables, k=3)) for _ in range(60))]
    return [" ".join(rng.choices(words, k=8)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_text_tokenizer(captions(), tmp_path_factory.mktemp("text") / "text.model", TextOptions(size=300))


@settings(deadline=None)
@given(ANY)
@example("<0x41>")
@example("<unk> <s> </s>")
@example("\u2581\u2581face\u2581")
@example("\ud800 \udfff")
@example("\x00\x1f\n\r\t\u2028")
@example("\u1100\u1161")
@example("ﬁne Å ① 家族 👩‍👩‍👧 ﷺ")
def test_any_text_comes_back_normalised(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == normalise(text)


@settings(deadline=None)
@given(ANY)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip()
    assert "  " not in once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \n\t face ", "a face"),
        ("\uff26\uff21ce", "FAce"),
        ("e\u0301", "\u00e9"),
        ("\u00a0", ""),
        ("a\u2581b", "a b"),
        ("a\ud800b", "a\ufffdb"),
    ],
)
def test_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 299), max_size=20))
def test_any_ids_have_a_text(tokenizer: TextTokenizer, ids: list[int]) -> None:
    tokenizer.decode(ids).encode("utf-8")


@pytest.mark.parametrize("outside", [-1, 300, 1 << 40])
def test_foreign_ids_are_refused(tokenizer: TextTokenizer, outside: int) -> None:
    with pytest.raises(ValueError, match=f"{outside} is no text id: they are 0 to 299"):
        tokenizer.decode([3, outside])


def test_it_learns_the_words(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert tokenizer.size == 300
    assert len(tokenizer.encode("woman brown hair")) == 3
    pairs = train_text_tokenizer(captions(), tmp_path / "a", TextOptions(size=360, kind="bpe"))
    assert len(pairs.encode("woman brown hair")) == 3
    assert pairs.decode(pairs.encode("a 家 face")) == "a 家 face"
    # Words that no other word contains: sentencepiece's unigram trainer would spell them out.
    options = TextOptions(size=282, character_coverage=1.0, kind="bpe")
    assert len(train_text_tokenizer(["with two of them"] * 50, tmp_path / "b", options).encode("with two of them")) == 4
    with pytest.raises(UserError, match="unigram"):
        TextOptions(kind="word")


def test_the_same_captions_give_the_same_file(tmp_path: Path) -> None:
    first, second = (train_text_tokenizer(captions(), tmp_path / name, TextOptions(size=300)) for name in ("a", "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.sha256 == second.sha256
    other = train_text_tokenizer(captions(199), tmp_path / "c", TextOptions(size=300))
    assert other.sha256 != first.sha256


def test_a_sample_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def hashed(name: str, seed: int) -> str:
        options = TextOptions(size=290, captions=30, seed=seed)
        return train_text_tokenizer(iter(captions()), tmp_path / name, options).sha256

    assert hashed("a", 0) == hashed("b", 0) != hashed("c", 1)


def test_it_travels_to_worker_processes(tokenizer: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("brown woman") == tokenizer.encode("brown woman")
    assert copy.sha256 == tokenizer.sha256


def test_the_largest_size_is_named_and_possible(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too few for 5000 pieces: at most (\d+) are possible") as caught:
        train_text_tokenizer(captions(), tmp_path / "a", TextOptions(size=5000))
    found = re.search(r"at most (\d+)", str(caught.value))
    assert found is not None
    largest = int(found[1])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=f"at most {largest} are possible"):
        train_text_tokenizer(captions(), tmp_path / "a", TextOptions(size=largest + 1))
    assert train_text_tokenizer(captions(), tmp_path / "a", TextOptions(size=largest)).size == largest


def test_the_smallest_size_is_named_and_possible(tmp_path: Path) -> None:
    corpus = ["".join(chr(0x4E00 + number) for number in range(start, start + 30)) for start in range(0, 300, 30)] * 3
    with pytest.raises(UserError, match=r"260 pieces are too few .* at least (\d+) are needed") as caught:
        train_text_tokenizer(corpus, tmp_path / "a", TextOptions(size=260, character_coverage=1.0))
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found is not None
    size = int(found[1])
    assert train_text_tokenizer(corpus, tmp_path / "a", TextOptions(size=size, character_coverage=1.0)).size == size


@pytest.mark.parametrize("gap", [" ", ""])
def test_long_captions_are_read_to_their_end(tmp_path: Path, gap: str) -> None:
    text = gap.join(["face"] * LONGEST_LINE) + gap + "家"
    trained = train_text_tokenizer([text, *captions()], tmp_path / "a", TextOptions(size=300, character_coverage=1.0))
    assert len(trained.encode("家")) == 2, "the beginning of a word and a piece, not three bytes"


@pytest.mark.parametrize("empty", [[], ["", " \n", "\u2581"]])
def test_no_captions(tmp_path: Path, empty: list[str]) -> None:
    with pytest.raises(UserError, match="no caption with text"):
        train_text_tokenizer(empty, tmp_path / "a", TextOptions())


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists: remove it"):
        train_text_tokenizer(captions(), tmp_path / "a", TextOptions(size=300))
    with pytest.raises(UserError, match="cannot be made"):
        train_text_tokenizer(captions(), tmp_path / "a" / "b", TextOptions(size=300))
    assert (tmp_path / "a").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 257}, "257 pieces is too small"),
        ({"character_coverage": 1.1}, "within 0.9 and 1"),
        ({"captions": 0}, "at least one caption"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextOptions(**options)


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="gptface tokenizer text") as caught:
        TextTokenizer.load(path)
    assert "\n" not in str(caught.value)
