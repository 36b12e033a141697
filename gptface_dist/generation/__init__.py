"""Generation: faces for a text, edits of a region, captions, and how well a pair matches.

from gptface_dist.generation import Generator

generator = Generator.from_pretrained("release")
for picture in generator.generate("A smiling woman with red hair.", n=4):
    picture.image.show()
"""

from gptface_dist.generation.generator import Caption, Generator
from gptface_dist.generation.options import Gradient, Guidance, Sampling
from gptface_dist.generation.pictures import Picture

__all__ = ["Caption", "Generator", "Gradient", "Guidance", "Picture", "Sampling"]
