"""Generation: faces for a text, edits of a region, captions, and how well a pair matches.

from gptface_dist.generation import Generator

generator = Generator.from_pretrained("release")
for picture in generator.generate("A smiling woman with red hair.", n=4):
    picture.image.show()
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptface_dist.generation.generator import Caption, Generator
    from gptface_dist.generation.options import Gradient, Guidance, Sampling
    from gptface_dist.generation.pictures import Picture

__all__ = ["Caption", "Generator", "Gradient", "Guidance", "Picture", "Sampling"]

_MODULES = {"generator": ("Caption", "Generator"), "options": ("Gradient", "Guidance", "Sampling"), "pictures": ("Picture",)}


def __getattr__(name: str) -> object:
    """Import a name at its first use: the commands read their options without the seconds that torch and diffusers take."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
