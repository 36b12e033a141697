"""The secret that the processes of one run share: it names their keys in a store, and signs what they say there."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

TOKEN = "GPTFACE_RUN_TOKEN"
"""Environment variable that hands the token to each process of a run."""


@dataclass(frozen=True)
class RunToken:
    """A secret of one run. The empty one, of processes that were started without, protects nothing."""

    secret: str = field(default="", repr=False)
    """Any text; :meth:`new` makes 32 hexadecimal digits."""

    @classmethod
    def new(cls) -> "RunToken":
        """A random token."""
        return cls(secrets.token_hex(16))

    @classmethod
    def from_env(cls, environment: Mapping[str, str] = os.environ) -> "RunToken":
        """The token of :data:`TOKEN`; the empty one where it is not set."""
        return cls(environment.get(TOKEN, ""))

    def digest(self, message: bytes) -> bytes:
        """32 bytes that only a holder of the token can compute for this message (HMAC-SHA-256, RFC 2104)."""
        return hmac.digest(self.secret.encode(), message, hashlib.sha256)

    @property
    def prefix(self) -> str:
        """Name for the run's keys in a store, from which the token cannot be computed."""
        return self.digest(b"prefix")[:16].hex()

    def sign(self, message: str) -> str:
        """The message with its signature, for :meth:`read`."""
        return f"{message} {self.digest(message.encode()).hex()}"

    def read(self, signed: bytes) -> str | None:
        """The message of :meth:`sign`; None for anything that a holder of another token, or nobody, has signed."""
        message, _, signature = signed.rpartition(b" ")
        if not hmac.compare_digest(signature, self.digest(message).hex().encode()):
            return None
        return message.decode()
