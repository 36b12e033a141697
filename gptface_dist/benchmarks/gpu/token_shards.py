"""Token shards for a training run: those that the user gives, or made-up ones that can be learned."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptface_dist.data import tokens
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.shards import ShardWriter, write_index
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary

VOCABULARY = Vocabulary(text_size=256, image_codes=64, text_sha256="0" * 64, image_sha256="0" * 64)
"""Of made-up shards; its tokenizers do not exist."""
GRID = (8, 8)


@dataclass(frozen=True)
class TokenShards:
    """Training data."""

    path: Path
    """Folder of the shards."""
    tokenizers: Path
    """Folder with their vocabulary; the tokenizers themselves are not needed."""


def recorded_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary that the index of token shards names; :class:`UserError` where they are none."""
    opened = ShardFolder.open(folder)
    vocabulary = tokens.recorded_vocabulary(opened.index.meta)
    if opened.index.kind != tokens.KIND or vocabulary is None:
        raise UserError(f"{folder} holds no token shards: make them with `gptface data tokenize`")
    return vocabulary


def given(folder: Path, work: Path) -> TokenShards:
    """The user's shards, with their vocabulary written into ``work``."""
    return _with_vocabulary(folder, recorded_vocabulary(folder), work)


def made_up(samples: int, work: Path) -> TokenShards:
    """Shards in ``work``: pictures of one code of eight, here and there another, and captions that name it."""
    rng = np.random.default_rng(0)
    folder = work / "tokens"
    folder.mkdir(parents=True)
    with ShardWriter(folder / "00000.tar") as writer:
        for number in range(samples):
            code = int(rng.integers(8))
            codes = np.where(rng.random(GRID) < 0.1, rng.integers(8, size=GRID), code)
            caption = [code] * int(rng.integers(1, 9))
            writer.write(f"{number:06d}", tokens.encode(codes, [caption]))
    write_index(folder, tokens.KIND, tokens.index_meta(VOCABULARY, GRID), sorted(folder.glob("*.tar")))
    return _with_vocabulary(folder, VOCABULARY, work)


def _with_vocabulary(folder: Path, vocabulary: Vocabulary, work: Path) -> TokenShards:
    tokenizers = work / "tokenizers"
    tokenizers.mkdir(parents=True)
    vocabulary.save(tokenizers / VOCABULARY_NAME)
    return TokenShards(folder, tokenizers)
