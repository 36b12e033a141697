"""Small corpora for tests: token shards with known content."""

from pathlib import Path

import numpy as np

from gptface_dist.data import tokens
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.shards import ShardWriter, write_index
from gptface_dist.data.stream import Source
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_codes=64, text_sha256="a" * 64, image_sha256="b" * 64)
GRID = (4, 6)


def write_tokens(
    folder: Path,
    shards: list[int],
    seed: int = 0,
    captions: int = 3,
    distinct: int = 50,
    vocabulary: Vocabulary = VOCABULARY,
) -> ShardFolder:
    """Token shards with the given numbers of samples; captions come from ``distinct`` different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pool = [rng.integers(vocabulary.text_size, size=rng.integers(1, 40)).tolist() for _ in range(distinct)]
    number = 0
    for shard, count in enumerate(shards):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for _ in range(count):
                codes = rng.integers(vocabulary.image_codes, size=GRID)
                chosen = [pool[i] for i in rng.integers(distinct, size=captions)]
                writer.write(f"{seed}-{number:06d}", tokens.encode(codes, chosen))
                number += 1
    write_index(folder, tokens.KIND, tokens.index_meta(vocabulary, GRID), sorted(folder.glob("*.tar")))
    return ShardFolder.open(folder)


def source(folder: Path, weight: float = 1.0) -> Source:
    """An indexed folder as a source."""
    return Source(ShardFolder.open(folder), weight)
