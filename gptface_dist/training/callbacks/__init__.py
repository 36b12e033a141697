"""Callbacks of the training loop, one per module."""
