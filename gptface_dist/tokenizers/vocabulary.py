"""The joint vocabulary: text ids, then image codes, then the special tokens, in one range of integers.

A folder of tokenizers holds ``text.model`` (sentencepiece), ``image/`` (a diffusers ``VQModel``) and ``vocabulary.json``,
which has the number of ids and the hash of each. Tokenised data and trained models carry this vocabulary; the hashes tell
whether a pair of tokenizers is the one they were made with. Imports neither torch nor diffusers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.files import sha256, write_atomically
from gptface_dist.tokenizers.image_files import codebook_size, image_sha256

VOCABULARY_NAME = "vocabulary.json"
VOCABULARY_FORMAT = "gptface-vocabulary-1"
TEXT_NAME = "text.model"
IMAGE_NAME = "image"
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """The joint id space ``[text ids | image codes | [PAD] [CLS] [SEP] [MASK]]``."""

    text_size: int
    """Pieces of the text tokenizer; their ids are ``[0, text_size)``."""
    image_codes: int
    """Codes of the image tokenizer; code ``c`` has the id ``text_size + c``."""
    text_sha256: str
    """SHA-256 of the text tokenizer's file."""
    image_sha256: str
    """Identity of the image tokenizer: :func:`gptface_dist.tokenizers.image_files.image_sha256`."""

    def __post_init__(self) -> None:
        for name in ("text_size", "image_codes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"a vocabulary's {name} must be a positive whole number, not {value!r}")
        for name in ("text_sha256", "image_sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
                raise UserError(f"a vocabulary's {name} must be 64 hexadecimal digits, not {value!r}")

    @property
    def size(self) -> int:
        """Number of ids: text, image and specials."""
        return self.text_size + self.image_codes + len(SPECIALS)

    @property
    def text_range(self) -> range:
        """Text ids, ``[0, text_size)``."""
        return range(self.text_size)

    @property
    def image_range(self) -> range:
        """Image ids, ``[text_size, text_size + image_codes)``."""
        return range(self.text_size, self.text_size + self.image_codes)

    @property
    def image_offset(self) -> int:
        """Id of image code 0: the id of code ``c`` is ``image_offset + c``."""
        return self.text_size

    @property
    def pad_id(self) -> int:
        """Id of [PAD], which fills a sequence up to the length of its batch."""
        return self.image_range.stop

    @property
    def cls_id(self) -> int:
        """Id of [CLS], the first token of every sequence; its output is the pooled one."""
        return self.image_range.stop + 1

    @property
    def sep_id(self) -> int:
        """Id of [SEP], which ends each modality."""
        return self.image_range.stop + 2

    @property
    def mask_id(self) -> int:
        """Id of [MASK], the input in place of a token to predict."""
        return self.image_range.stop + 3

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        raw = {"format": VOCABULARY_FORMAT, **asdict(self), "specials": list(SPECIALS), "size": self.size}
        write_atomically(path, json.dumps(raw, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Load a vocabulary that :meth:`save` wrote.

        :class:`UserError` where the file is missing, is no vocabulary, is of another format, or contradicts itself.
        """
        if not path.is_file():
            raise UserError(f"{path} does not exist: make it with `gptface tokenizer join {path.parent}`")
        hint = f"make it anew with `gptface tokenizer join {path.parent}`"
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != VOCABULARY_FORMAT:
                raise UserError(f"{path} has the format {raw['format']!r}, not {VOCABULARY_FORMAT!r}: {hint}")
            fields = {name: raw[name] for name in ("text_size", "image_codes", "text_sha256", "image_sha256")}
            size, specials = raw["size"], tuple(raw["specials"])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no vocabulary ({type(error).__name__}: {error}): {hint}") from None
        try:
            vocabulary = cls(**fields)
        except UserError as error:
            raise UserError(f"{path}: {error}: {hint}") from None
        if (size, specials) != (vocabulary.size, SPECIALS):
            raise UserError(f"{path} says {size} ids with {specials}, its parts make {vocabulary.size} with {SPECIALS}: {hint}")
        return vocabulary


def join(folder: Path) -> Vocabulary:
    """Make ``folder/vocabulary.json`` from ``folder/text.model`` and ``folder/image/``.

    :class:`UserError` where a tokenizer is missing or unreadable, or the folder already has a vocabulary of others.
    """
    # sentencepiece is needed to make a vocabulary, not to load one.
    from gptface_dist.tokenizers.text import TextTokenizer

    text = TextTokenizer.load(folder / TEXT_NAME)
    image = folder / IMAGE_NAME
    vocabulary = Vocabulary(text.size, codebook_size(image), text.sha256, image_sha256(image))
    path = folder / VOCABULARY_NAME
    if path.exists() and Vocabulary.load(path) != vocabulary:
        raise UserError(
            f"{path} was made from other tokenizers than those beside it: remove it to join these, "
            "and tokenise the data and train the model again"
        )
    vocabulary.save(path)
    return vocabulary


def verify(folder: Path) -> Vocabulary:
    """Load ``folder/vocabulary.json`` and check that the tokenizers beside it are the ones it was made from.

    :class:`UserError` where a file is missing or has another hash; the message names both hashes.
    """
    vocabulary = Vocabulary.load(folder / VOCABULARY_NAME)
    text, image = folder / TEXT_NAME, folder / IMAGE_NAME
    if not text.is_file():
        raise UserError(f"{text} does not exist, but {folder / VOCABULARY_NAME} was made from it: put it back")
    for path, digest, wanted in (
        (text, sha256(text), vocabulary.text_sha256),
        (image, image_sha256(image), vocabulary.image_sha256),
    ):
        if digest != wanted:
            raise UserError(
                f"{path} has the hash {digest}, but {folder / VOCABULARY_NAME} was made from {wanted}: "
                "put back the tokenizer that the data and the model were made with"
            )
    return vocabulary
