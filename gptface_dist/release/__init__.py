"""Releases: folders that hold a model, its tokenizers and where they come from, for people who have only PyTorch."""

from gptface_dist.release.card import Card
from gptface_dist.release.reader import Release, load, weights
from gptface_dist.release.writer import save

__all__ = ["Card", "Release", "load", "save", "weights"]
