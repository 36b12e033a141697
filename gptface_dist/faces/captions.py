"""Captions in the manner of the web: sentences, noun phrases and lists of tags, from one attribute to all of them.

The content of captions comes from :mod:`~.facts`; this module puts it into grammatical words. Left and right are those of
the picture.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from gptface_dist.faces.attributes import Attributes
from gptface_dist.faces.facts import Fact, Person, Wording, person, with_article

# How many facts a caption tells, and how often; 99 stands for all there are.
FACTS, FACTS_WEIGHTS = (1, 2, 3, 4, 5, 7, 99), (0.2, 0.24, 0.18, 0.12, 0.08, 0.06, 0.12)
LEADS = (
    "stock photo of",
    "photo of",
    "portrait of",
    "close-up of",
    "headshot of",
    "picture of",
    "image of",
    "close-up portrait of",
)
TRAILERS = (" - stock photo", " | portrait", ", portrait photography", " - profile picture", ", headshot")
NOISE_TAGS = ("portrait", "stock photo", "headshot", "face", "profile picture", "close-up", "people")
VERBS = ("has", "wears", "is")


def captions(
    face: Attributes, random: np.random.Generator, count: int, hidden: Collection[str] = (), prominent: float = 0.0
) -> list[str]:
    """``count`` different captions of a rendered face: true of it, and silent about what its picture hides.

    ``hidden`` are classes of the parsing mask that cannot be seen though the attributes let expect them: see
    :func:`~.facts.hidden`. ``prominent`` is the share of captions that tell everything prominent first.
    """
    return distinct(lambda: person(face, random, hidden), random, count, prominent)


def distinct(describe: Callable[[], Person], random: np.random.Generator, count: int, prominent: float = 0.0) -> list[str]:
    """``count`` different captions; ``describe`` gives their subject, each time in other wordings of its facts."""
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[caption(describe(), random, prominent)] = None
    return list(captions)


def caption(subject: Person, random: np.random.Generator, prominent: float = 0.0) -> str:
    """One caption: its form, its length and the choice of facts are drawn."""
    draw = Wording(random)
    number = int(random.choice(FACTS, p=FACTS_WEIGHTS))
    facts = [subject.facts[number] for number in random.permutation(len(subject.facts))]
    # Without prominence nothing is drawn for it: the captions are those of before there was such a choice.
    if prominent and draw.happens(prominent):
        facts.sort(key=lambda fact: not fact.prominent)
        number = max(number, sum(fact.prominent for fact in facts))
    facts = facts[:number]
    form = random.choice(3, p=(0.4, 0.4, 0.2))
    text = (_sentences, _phrase, _tags)[form](subject, facts, draw)
    his, he = ("his", "he") if subject.male else ("her", "she")
    return text.format(Her=his.capitalize(), her=his, She=he.capitalize(), she=he)


def _sentences(subject: Person, facts: Sequence[Fact], draw: Wording) -> str:
    """``She has a flat nose and is smiling. Her hair is short.``"""
    noun = f"{subject.age} {subject.noun}".strip() if draw.happens(0.6) else subject.noun
    sentences = []
    name = draw.one("{She}", "{She}", f"This {noun}", f"The {noun}")
    if not facts or (len(facts) > 2 and draw.happens(0.3)):
        sentences.append(draw.one(f"This is {with_article(noun)}.", f"The picture shows {with_article(noun)}."))
        name = "{She}"
    rest = list(facts)
    while rest:
        taken = 1 if rest[0].sentence else int(draw.random.integers(1, 4))
        group, rest = rest[:taken], rest[taken:]
        if group[0].sentence:
            sentences.append(group[0].sentence)
        else:
            sentences.append(f"{name} {_predicate(group, draw)}.")
        name = "{She}"
    return " ".join(sentences)


def _predicate(facts: Sequence[Fact], draw: Wording) -> str:
    """``has A and B, is wearing C and is smiling``."""
    wears = draw.one("is wearing", "wears")
    spoken = {"has": "has", "wears": wears, "is": "is"}
    parts = []
    for verb in VERBS:
        texts = [fact.text for fact in facts if fact.verb == verb]
        if texts:
            parts.append(f"{spoken[verb]} {_joined(texts)}")
    return _joined(parts)


def _phrase(subject: Person, facts: Sequence[Fact], draw: Wording) -> str:
    """``Portrait of a smiling young woman with long red hair, wearing a green cap``."""
    adjectives: list[str] = []
    left = []
    for fact in facts:
        if fact.adjective and len(adjectives) < 2 and (fact.verb == "is" or draw.happens(0.5)):
            adjectives.append(fact.adjective)
        else:
            left.append(fact)
    if subject.age and draw.happens(0.6):
        adjectives.append(subject.age)
    words = with_article(" ".join([*adjectives, subject.noun]))
    has, wears, state = ([fact.text for fact in left if fact.verb == verb] for verb in VERBS)
    if has:
        words += f" with {_joined(has)}"
    if wears:
        words += f"{',' if has else ''} wearing {_joined(wears)}"
    for text in state:
        words += f", {text}"
    if draw.happens(0.4):
        words = f"{draw.one(*LEADS)} {words}"
    if draw.happens(0.5):
        words = words[0].upper() + words[1:]
        if draw.happens(0.5):
            return words + "."
    return words + (draw.one(*TRAILERS) if draw.happens(0.2) else "")


def _tags(subject: Person, facts: Sequence[Fact], draw: Wording) -> str:
    """``portrait, old man, full beard, blue eyes``."""
    tags = [f"{subject.age} {subject.noun}".strip() if draw.happens(0.6) else subject.noun]
    tags += [fact.tag or fact.text for fact in facts]
    if draw.happens(0.6):
        tags.insert(0 if draw.happens(0.5) else len(tags), draw.one(*NOISE_TAGS))
    return draw.one(", ", ", ", " | ").join(tags)


def _joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
