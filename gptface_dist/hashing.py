"""Hashes of text that are the same on every machine and in every process."""

import hashlib


def stable_hash(text: str, size: int = 8) -> int:
    """BLAKE2 of the text as an unsigned number of ``size`` bytes."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size).digest()
    return int.from_bytes(digest, "little")
