"""Facts about a face for its captions: only what is true of it and visible in its picture.

A thing that another one hides is never a fact: beard, lipstick, freckles and expression under a face mask, the eyes and
brows behind sunglasses, the colour of closed eyes, hair (or its absence) under a hat, ears behind hanging hair. The shape
of the head is never put into words. Hair that hangs out under a cap is seen; of hair under a beanie nothing is said.

Left and right are those of the picture, as in captions written by people who look at it: a face with negative yaw is
turned towards the left edge, and "looks to the left". Between looking ahead and looking aside nothing is said.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import RAISED, TURNED, Attributes
from gptface_dist.faces.materials import LABEL

HIDES_MOUTH = "face mask"
HIDES_EYES = "sunglasses"
HIDES_SCALP = ("cap", "beanie")
HANGING_STYLES = ("medium", "long")
# Anger, fear and disgust are read off eyes and brows, which sunglasses hide; these are not.
SEEN_AT_MOUTH = ("happy", "sad", "surprised")
# Share of the picture that these must cover to be spoken of: the crop or a turn of the head may hide them.
LEAST_SEEN = {"cloth": 0.01, "earring": 0.0005}


@dataclass(frozen=True)
class Fact:
    """One thing that is true of a face, in one wording."""

    verb: str
    """Verb between subject and complement: ``has``, ``wears``, ``is``."""
    text: str
    """Complement of the verb: ``thick eyebrows``, ``a red cap``, ``smiling``."""
    tag: str = ""
    """The same without a sentence around it, where that differs from the text: ``red cap``."""
    sentence: str = ""
    """A whole sentence instead of subject and verb; ``{Her}`` and ``{her}`` stand for the possessive pronoun."""
    adjective: str = ""
    """The same as a word before the noun: ``smiling``."""
    prominent: bool = False
    """Whether people mention it first: hair, expression, glasses."""


@dataclass(frozen=True)
class Person:
    """The subject of a caption."""

    noun: str
    """``man``, ``woman``, ``boy``, ``girl``."""
    male: bool
    """Selects the pronouns: he, his if True, else she, her."""
    facts: tuple[Fact, ...]
    """Facts about the person, in no particular order."""
    age: str = ""
    """Adjective of age, where one is known and the noun does not tell it."""


class Wording:
    """Draws one of several wordings that mean the same."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def one(self, *options: str) -> str:
        """One of the options, all equally likely."""
        return options[int(self.random.integers(len(options)))]

    def happens(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.random.random() < probability)


def with_article(words: str) -> str:
    """``a red cap``, ``an orange cap``: of words that begin as they are written."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def hidden(labels: NDArray[np.uint8]) -> frozenset[str]:
    """Classes of LEAST_SEEN that a parsing mask (size, size) shows too little of."""
    return frozenset(name for name, share in LEAST_SEEN.items() if np.mean(labels == LABEL[name]) < share)


def person(face: Attributes, random: np.random.Generator, hidden: Collection[str] = ()) -> Person:
    """Everything that may be said of a face, each in a wording drawn from ``random``; nothing of the ``hidden`` classes."""
    draw = Wording(random)
    male = face.gender == "male"
    adult = face.age != "child"
    age = {
        "child": lambda: draw.one("", "little", "young"),
        "young": lambda: "young",
        "middle-aged": lambda: "middle-aged",
        "old": lambda: draw.one("old", "elderly", "senior"),
    }[face.age]()
    noun = ("man" if male else "woman") if adult else ("boy" if male else "girl")
    facts = [
        *_prominent(_hair(face, draw)),
        *_eyes(face, draw),
        *_lower_face(face, draw),
        *_prominent(_expression(face, draw)),
        *_prominent(_glasses(face, draw)),
        *_worn(face, draw, hidden),
        *_pose(face, draw),
        *_skin(face, draw),
        *_surroundings(face, draw),
    ]
    return Person(noun, male, tuple(facts), age)


def _prominent(facts: list[Fact]) -> list[Fact]:
    return [replace(fact, prominent=True) for fact in facts]


def _hair(face: Attributes, draw: Wording) -> list[Fact]:
    if face.hat in HIDES_SCALP and not (face.hat == "cap" and face.hair_style in HANGING_STYLES):
        return []
    if face.hair_style == "bald":
        return [Fact("is", "bald", sentence=draw.one("", "", "{Her} head is bald."), adjective="bald")]
    color = {
        "blond": lambda: draw.one("blond", "blonde", "golden"),
        "gray": lambda: draw.one("gray", "grey"),
        "red": lambda: draw.one("red", "ginger"),
    }.get(face.hair_color, lambda: face.hair_color)()
    style = {"buzz cut": "very short", "medium": "medium-length"}.get(face.hair_style, face.hair_style)
    about = draw.one("both", "both", "color", "style")
    if about == "color":
        facts = [Fact("has", f"{color} hair", sentence=draw.one("", f"{{Her}} hair is {color}."))]
    elif style == "bun":
        facts = [Fact("has", f"{color} hair in a bun" if about == "both" else "hair in a bun")]
    elif style == "afro" or (face.hair_style == "buzz cut" and draw.happens(0.5)):
        cut = f"{color} {face.hair_style}" if about == "both" else face.hair_style
        facts = [Fact("has", with_article(cut), cut)]
    elif about == "both":
        facts = [Fact("has", f"{style} {color} hair", sentence=draw.one("", f"{{Her}} hair is {style} and {color}."))]
    else:
        facts = [Fact("has", f"{style} hair", sentence=draw.one("", f"{{Her}} hair is {style}."))]
    if face.fringe and face.hat == "none" and face.hair_style in ("short", "medium", "long"):
        fringe = draw.one("a fringe", "bangs")
        facts.append(Fact("has", fringe, fringe.removeprefix("a ")))
    return facts


def _eyes(face: Attributes, draw: Wording) -> list[Fact]:
    if face.glasses == HIDES_EYES:
        return []
    facts = []
    if face.eyes_closed:
        sentence = draw.one("", "{Her} eyes are closed.", "{Her} eyes are shut.")
        facts.append(Fact("has", "closed eyes", draw.one("closed eyes", "eyes closed"), sentence))
    else:
        color = draw.one("gray", "grey") if face.eye_color == "gray" else face.eye_color
        facts.append(Fact("has", f"{color} eyes", sentence=draw.one("", f"{{Her}} eyes are {color}.")))
    if face.thick_eyebrows:
        brows = draw.one("thick eyebrows", "bushy eyebrows")
        facts.append(Fact("has", brows, sentence=draw.one("", "", f"{{Her}} eyebrows are {brows.split()[0]}.")))
    return facts


def _lower_face(face: Attributes, draw: Wording) -> list[Fact]:
    if face.covering == HIDES_MOUTH:
        return []
    facts = []
    if face.beard == "full beard":
        beard = draw.one("a beard", "a full beard")
        facts.append(Fact("has", beard, beard.removeprefix("a "), adjective="bearded"))
    elif face.beard == "moustache":
        beard = draw.one("a moustache", "a mustache")
        facts.append(Fact("has", beard, beard.removeprefix("a ")))
    elif face.beard == "goatee":
        facts.append(Fact("has", "a goatee", "goatee"))
    elif face.beard == "stubble":
        facts.append(Fact("has", "stubble", sentence=draw.one("", "{Her} face is unshaven."), adjective="unshaven"))
    elif face.gender == "male" and face.age != "child" and draw.happens(0.4):
        facts.append(Fact("is", "clean-shaven", adjective="clean-shaven"))
    if face.lipstick != "none":
        facts.append(Fact("wears", f"{face.lipstick} lipstick", sentence=draw.one("", f"{{Her}} lipstick is {face.lipstick}.")))
    if face.freckles:
        facts.append(Fact("has", "freckles", adjective="freckled"))
    return facts


def _expression(face: Attributes, draw: Wording) -> list[Fact]:
    if face.covering == HIDES_MOUTH or (face.glasses == HIDES_EYES and face.expression not in SEEN_AT_MOUTH):
        return []
    if face.expression == "happy":
        if draw.happens(0.3):
            return [Fact("has", "a happy expression", "happy", adjective="happy")]
        return [Fact("is", "smiling", sentence=draw.one("", "", "There is a smile on {her} face."), adjective="smiling")]
    if face.expression == "neutral":
        return [Fact("has", "a neutral expression", "neutral expression", draw.one("", "{Her} expression is neutral."))]
    word = {
        "sad": lambda: draw.one("sad", "unhappy"),
        "angry": lambda: "angry",
        "surprised": lambda: draw.one("surprised", "astonished"),
        "disgusted": lambda: "disgusted",
        "afraid": lambda: draw.one("scared", "frightened"),
    }[face.expression]()
    form = draw.one("expression", "looks", "face")
    if form == "expression":
        return [Fact("has", with_article(f"{word} expression"), f"{word} expression", adjective=word)]
    if form == "face":
        return [Fact("has", with_article(f"{word} look on {{her}} face"), f"{word} face", adjective=word)]
    return [Fact("is", word, sentence=draw.one("", f"{{She}} looks {word}.", f"{{She}} seems {word}."), adjective=word)]


def _glasses(face: Attributes, draw: Wording) -> list[Fact]:
    if face.glasses == "none":
        return []
    if face.glasses == HIDES_EYES:
        return [Fact("wears", draw.one("sunglasses", "dark sunglasses", "a pair of sunglasses"), "sunglasses")]
    return [Fact("wears", draw.one("glasses", "eyeglasses", f"{face.glasses} glasses", "a pair of glasses"), "glasses")]


def _worn(face: Attributes, draw: Wording, hidden: Collection[str]) -> list[Fact]:
    facts = []
    if face.hat != "none":
        kinds = {"cap": ("cap", "cap", "hat"), "beanie": ("beanie", "knit cap", "hat"), "headband": ("headband",)}[face.hat]
        facts.append(_thing(face.hat_color, draw.one(*kinds), draw))
    if face.covering == HIDES_MOUTH:
        facts.append(_thing(face.covering_color, draw.one("face mask", "face mask", "mask"), draw))
    if face.earrings and _ears_seen(face) and "earring" not in hidden:
        facts.append(Fact("wears", "earrings"))
    if "cloth" not in hidden:
        facts.append(_thing(face.clothes_color, draw.one(face.clothes, face.clothes, "top"), draw))
    return facts


def _thing(color: str, noun: str, draw: Wording) -> Fact:
    """A worn thing, with or without its colour."""
    tag = f"{color} {noun}" if draw.happens(0.75) else noun
    return Fact("wears", with_article(tag), tag)


def _ears_seen(face: Attributes) -> bool:
    """Whether no hair hangs over the ears."""
    return face.hair_style in ("bald", "buzz cut", "short", "bun") or (face.hair_style == "curly" and face.gender == "male")


def _pose(face: Attributes, draw: Wording) -> list[Fact]:
    if abs(face.yaw) < TURNED / 2 and abs(face.pitch) < RAISED / 2:
        return [Fact("is", draw.one("facing the camera", "facing forward"))]
    # Where eyes cannot be seen, only the head is spoken of.
    verb = "facing" if face.eyes_closed or face.glasses == HIDES_EYES else draw.one("looking", "looking", "facing")
    facts = []
    if abs(face.yaw) > TURNED:
        side = "left" if face.yaw < 0 else "right"
        facts.append(Fact("is", f"{verb} {draw.one(f'to the {side}', side)}"))
    elif abs(face.pitch) > RAISED:
        facts.append(Fact("is", f"{verb} {'up' if face.pitch > 0 else 'down'}"))
    return facts


def _skin(face: Attributes, draw: Wording) -> list[Fact]:
    if face.skin == "medium":
        return []
    word = {"light": ("light", "fair"), "tan": ("tan", "tanned"), "brown": ("brown",), "dark": ("dark",)}[face.skin]
    return [Fact("has", f"{draw.one(*word)} skin")] if draw.happens(0.5) else []


def _surroundings(face: Attributes, draw: Wording) -> list[Fact]:
    color = face.background_color
    if face.background == "plain":
        text, tag = with_article(f"{color} background"), f"{color} background"
        if draw.happens(0.3):
            text, tag = f"a plain {color} background", "plain background"
        sentence = f"The background is {color}."
    elif face.background == "gradient":
        return []
    else:
        text, sentence = "a blurred background", "The background is blurred."
        tag = draw.one("blurred background", "blurry background")
    return [Fact("is", f"in front of {text}", tag, draw.one("", sentence))]
