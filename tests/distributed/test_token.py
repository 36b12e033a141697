"""The run's secret: what it signs only its holders can, and nothing else is read."""

import random

import pytest

from gptface_dist.distributed.token import TOKEN, RunToken


def test_it_signs_as_rfc_4231_does() -> None:
    """Test case 2 of RFC 4231."""
    digest = RunToken("Jefe").digest(b"what do ya want for nothing?")
    assert digest.hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"


def test_a_holder_reads_what_a_holder_signed() -> None:
    token = RunToken.new()
    assert RunToken(token.secret).read(token.sign("1:2").encode()) == "1:2"
    assert token.read(token.sign("").encode()) == ""


def test_nothing_else_is_read() -> None:
    token, rng = RunToken.new(), random.Random(0)
    signed = token.sign("1:2").encode()
    for other in (b"", b"0:99", b"\xff\xfe\x00", b"1:2 ", signed[:-1], b"2" + signed[1:], RunToken.new().sign("1:2").encode()):
        assert token.read(other) is None
    for _ in range(500):
        place = rng.randrange(len(signed))
        changed = bytes([*signed[:place], signed[place] ^ rng.randrange(1, 256), *signed[place + 1 :]])
        assert token.read(changed) is None
        assert token.read(rng.randbytes(rng.randrange(100))) is None


def test_the_prefix_does_not_tell_the_token() -> None:
    token = RunToken.new()
    assert token.secret not in token.prefix
    assert token.prefix != RunToken.new().prefix
    assert token.secret not in repr(token)


@pytest.mark.parametrize("secret", ["", "x" * 32])
def test_it_comes_by_environment(secret: str) -> None:
    assert RunToken.from_env({TOKEN: secret}).secret == secret
    assert RunToken.from_env({}).secret == ""
