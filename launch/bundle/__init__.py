"""One archive that carries the project to a GPU machine without internet (docs/gpu.md), and what installs it there."""
