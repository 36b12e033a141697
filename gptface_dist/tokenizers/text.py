"""The text tokenizer: a sentencepiece model with byte fallback, so that every text has an encoding.

Both directions agree up to :func:`normalise`: ``decode(encode(text)) == normalise(text)`` for any string.
"""

import io
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from gptface_dist.errors import UserError
from gptface_dist.files import sha256, write_atomically

# sentencepiece skips lines above 4192 bytes; a character has at most 4 bytes in UTF-8.
LONGEST_LINE = 1000
WORD_MARK = "\u2581"  # sentencepiece's own sign for a space
SURROGATE = re.compile("[\ud800-\udfff]")


KINDS = ("unigram", "bpe")


@dataclass(frozen=True)
class TextOptions:
    """Size and kind of a text tokenizer, and the sample of captions that trains it."""

    size: int = 8192
    """Number of pieces, among them 256 bytes and the (never used) unknown piece."""
    character_coverage: float = 0.9995
    """Share of the corpus' characters that become pieces of their own; the rarest others are spelled in bytes."""
    kind: str = "unigram"
    """``unigram`` (Kudo 2018), or ``bpe``, which is better on a small corpus: sentencepiece (0.2) finds unigram's candidates
    in substrings that several *distinct* words share, and spells out the commonest word ("with") if no other contains it."""
    captions: int = 2_000_000
    """Largest number of captions to train on; of more captions, a uniform sample of this size."""
    seed: int = 0
    """Seed of that sample."""

    def __post_init__(self) -> None:
        if self.size < 258:
            raise UserError(f"a text tokenizer of {self.size} pieces is too small: 256 bytes and 2 more are the least")
        if not 0.9 <= self.character_coverage <= 1:
            raise UserError(f"character coverage must be within 0.9 and 1, not {self.character_coverage}")
        if self.kind not in KINDS:
            raise UserError(f"a text tokenizer is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.captions < 1:
            raise UserError(f"at least one caption must be used, not {self.captions}")


def normalise(text: str) -> str:
    """Normalise a text: Unicode NFKC, each run of white space as one space, none at the ends.

    Line breaks are white space, and so is sentencepiece's word mark U+2581. Lone surrogates (not text: they have no
    UTF-8) become U+FFFD.
    """
    text = unicodedata.normalize("NFKC", SURROGATE.sub("\ufffd", text))
    return " ".join(text.replace(WORD_MARK, " ").split())


class TextTokenizer:
    """A trained text tokenizer; picklable, so that it can be passed to data workers."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, digest: str):
        self._processor = processor
        self.sha256 = digest
        """SHA-256 of the model's file."""

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Load a sentencepiece model file; :class:`UserError` where it is missing or not one."""
        if not path.is_file():
            raise UserError(f"{path} does not exist: train a text tokenizer with `gptface tokenizer text DATA {path}`")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            pieces = processor.get_piece_size()
        except RuntimeError:
            pieces = 0
        if not pieces:  # an empty file loads, as a model of no pieces
            raise UserError(f"{path} is no sentencepiece model: train one with `gptface tokenizer text`")
        return cls(processor, sha256(path))

    @property
    def size(self) -> int:
        """Number of pieces; ids are ``[0, size)``."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; [] if it is empty after :func:`normalise`."""
        return self._processor.encode(normalise(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that make no UTF-8 become U+FFFD. ``ValueError`` for an id outside ``[0, size)``."""
        if outside := [i for i in ids if not 0 <= i < self.size]:
            raise ValueError(f"{outside[0]} is no text id: they are 0 to {self.size - 1}")
        return self._processor.decode([int(i) for i in ids])


def train_text_tokenizer(captions: Iterable[str], path: Path, options: TextOptions) -> TextTokenizer:
    """Train on captions and write the model to ``path``, whole or not at all.

    The same captions in the same order give the same file. :class:`UserError` where the file exists, no caption holds
    text or the vocabulary does not fit the corpus.
    """
    if path.exists():
        raise UserError(f"{path} exists: remove it, and what was made with it, to train another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror}") from None
    sample = _sample((clean for clean in map(normalise, captions) if clean), options.captions, options.seed)
    if not sample:
        raise UserError("there is no caption with text in the data: nothing to train a text tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for caption in sample for line in _lines(caption)),
            model_writer=model,
            model_type=options.kind,
            vocab_size=options.size,
            character_coverage=options.character_coverage,
            byte_fallback=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # The texts are in NFKC already. The model still carries sentencepiece's own, weaker rule (a table of longest
            # prefixes that leaves some sequences decomposed, such as Hangul jamo), for other programs that load it.
            normalization_rule_name="nfkc",
            # sentencepiece's sample comes from std::random_device, so we draw our own above. Each thread sums its share of
            # the expected counts, so the result depends on the number of threads, which is fixed here.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=8,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, options) from None
    write_atomically(path, model.getvalue())
    return TextTokenizer.load(path)


def _sample(captions: Iterable[str], count: int, seed: int) -> list[str]:
    """Reservoir sampling (Vitter's algorithm R): all captions, or a uniform sample of ``count`` of them."""
    generator = random.Random(seed)
    chosen: list[str] = []
    for position, caption in enumerate(captions):
        if position < count:
            chosen.append(caption)
        elif (slot := int(generator.random() * (position + 1))) < count:
            chosen[slot] = caption
    return chosen


def _lines(caption: str) -> Iterator[str]:
    """A caption cut between words (inside a word where it alone is too long) into lines that sentencepiece does not skip."""
    while len(caption) > LONGEST_LINE:
        cut = caption.rfind(" ", 0, LONGEST_LINE + 1)
        cut = cut if cut > 0 else LONGEST_LINE
        yield caption[:cut]
        caption = caption[cut:].lstrip(" ")
    if caption:
        yield caption


def _explain(error: RuntimeError, options: TextOptions) -> UserError:
    """Translate an error of sentencepiece into one with the options of ``gptface tokenizer text``."""
    message = str(error)
    if limit := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(f"the captions are too few for {options.size} pieces: at most {limit[1]} are possible, use --size")
    if limit := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"{options.size} pieces are too few for the captions' characters: at least {limit[1]} are needed, "
            "use a larger --size or a lower --character-coverage"
        )
    return UserError(
        f"sentencepiece cannot train on these captions: {message.splitlines()[0] if message else 'no reason given'}"
    )
