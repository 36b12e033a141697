"""Checkpoints of a run: independent of the layout, published atomically, resumable on any layout."""
