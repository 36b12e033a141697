"""Checkpoints of a run: layout-free, published whole or not at all, resumed on any layout."""
