"""Overrides of a dataclass instance, and the list of its options."""

from dataclasses import dataclass, field

import pytest

from gptface_dist.config import Option, options, override
from gptface_dist.errors import UserError
from gptface_dist.generation.options import GenerationOptions


@dataclass(frozen=True)
class Paint:
    """Without parts."""

    name: str
    """Of the colour,
    in ``English``."""
    coats: int = 2


@dataclass(frozen=True)
class Wall:
    """With a part."""

    paint: Paint = field(default_factory=lambda: Paint("red"))
    """All of it."""
    height: float = 2.5
    """Metres."""


def test_the_last_one_wins_and_the_rest_stays() -> None:
    base = Wall(Paint("blue"))
    assert override(base, ["height=3", "paint.coats=4", "height=3.5"]) == Wall(Paint("blue", 4), 3.5)
    assert base == Wall(Paint("blue"))
    assert override(base, []) == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paint.coat=4", "override 'paint.coat=4': Key 'coat' not in 'Paint'. Did you mean: 'coats'?"),
        ("coats=4", "override 'coats=4': Key 'coats' not in 'Wall'"),
        ("paint.coats=many", "override 'paint.coats=many': Value 'many'"),
        ("paint.coats=1.5", "override 'paint.coats=1.5': Value '1.5'"),
        ("paint.coats=", "override 'paint.coats=': Incompatible value 'None'"),
        ("paint.coats=???", "override 'paint.coats=???': Missing mandatory value"),
        ("paint.coats=[1", "override 'paint.coats=[1': did not find expected ',' or ']'"),
        ("paint.coats=${none}", "override 'paint.coats=${none}': Interpolation key 'none' not found"),
        ("paint=3", "override 'paint=3': Merge error"),
        ("paint", "override 'paint' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("[=3", "override '[=3' is not of the form key=value"),
        ("a\nb=3", r"override 'a\nb=3': Key"),
    ],
)
def test_mistakes_quote_the_override_and_list_the_keys(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        override(Wall(), ["height=3", text])
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(" (keys: paint.name, paint.coats, height)")
    assert "\n" not in str(caught.value)


def test_options_are_the_leaves_with_the_sentences_under_them() -> None:
    assert list(options(Wall())) == [
        Option("paint.name", "red", "Of the colour, in `English`."),
        Option("paint.coats", 2, ""),
        Option("height", 2.5, "Metres."),
    ]
    assert all(option.meaning for option in options(GenerationOptions()))
