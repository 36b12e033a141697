"""GPTFace: one bidirectional transformer that reads and writes text and face images, and the system that trains it."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, kernels/, launch/ and tools/ stand beside this folder, and setup.py maps them into this package. A checkout on
# PYTHONPATH that was not installed does the same here. A release that is installed has them inside.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (_CHECKOUT / "gptface_dist" / "tools").exists() and (_CHECKOUT / "tools" / "main.py").exists():
    __path__.append(str(_CHECKOUT))
