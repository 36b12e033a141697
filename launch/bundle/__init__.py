"""Build an archive of the project for a GPU machine without internet (docs/gpu.md), and install it there."""
