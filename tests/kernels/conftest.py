"""Without a GPU, Triton's kernels are interpreted; with one, the same tests run the compiled kernels."""

import os

import torch

# Triton decides when it is imported. What other tests import it for does not run kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
