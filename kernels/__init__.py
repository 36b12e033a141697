"""Kernels that the model's speed hangs on, each beside its reference. Importing this package imports no triton."""
