"""GPTFace: one bidirectional transformer that reads and writes text and face images, and the system that trains it."""

__version__ = "0.1.0"
