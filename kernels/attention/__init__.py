"""Bidirectional attention in FP8 for training: recipe, oracle, Triton kernels, and the operator that PyTorch sees."""
