"""Captions are true, grammatical and of many forms: judged by a parser of keywords written here, not by their maker.

Each rule says: whoever uses these words claims this. A claim must hold in the attributes, and what it speaks of must be
in sight. Every word that a caption may use is listed, so that a new one cannot slip in unjudged.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from gptface_dist.faces.attributes import (
    BEARDS,
    CAPTION_STREAM,
    COLORS,
    EXPRESSIONS,
    EYE_COLORS,
    GLASSES,
    HAIR_COLORS,
    HAIR_STYLES,
    HATS,
    Attributes,
    draw_attributes,
    stream,
)
from gptface_dist.faces.captions import captions
from gptface_dist.faces.facts import hidden
from gptface_dist.faces.materials import LABEL
from gptface_dist.faces.render import Renderer

FACES = 2000

Claim = Callable[[Attributes], bool]


def mouth_seen(face: Attributes) -> bool:
    return face.covering == "none"


def eyes_seen(face: Attributes) -> bool:
    return face.glasses != "sunglasses"


def hair_seen(face: Attributes) -> bool:
    if face.hair_style == "bald" or face.hat == "beanie":
        return False
    return face.hat != "cap" or face.hair_style in ("medium", "long")


def scalp_seen(face: Attributes) -> bool:
    return face.hat in ("none", "headband")


def looks(*expressions: str) -> Claim:
    # Behind sunglasses only the mouth tells: anger, fear and disgust may not be claimed.
    told_by_mouth = ("happy", "sad", "surprised")
    return lambda f: f.expression in expressions and mouth_seen(f) and (eyes_seen(f) or f.expression in told_by_mouth)


def hair_is(color: str) -> Claim:
    return lambda f: f.hair_color == color and hair_seen(f)


def style_is(*styles: str) -> Claim:
    return lambda f: f.hair_style in styles and hair_seen(f)


HAIR_WORDS = {
    r"black": "black", r"brown": "brown", r"blonde?|golden": "blond", r"red|ginger": "red", r"gr[ae]y": "gray",
    r"white": "white",
}  # fmt: skip
LENGTHS = {
    r"(?<!very )short": ("short", "buzz cut"), r"very short": ("buzz cut",), r"medium-length": ("medium",), r"long": ("long",),
    r"curly": ("curly",),
}  # fmt: skip

EXPRESSION_RULES: dict[str, Claim] = {
    r"\b(happy|smil\w+)\b": looks("happy"),
    r"\bneutral\b": looks("neutral"),
    r"\b(sad|unhappy)\b": looks("sad"),
    r"\bangry\b": looks("angry"),
    r"\b(surprised|astonished)\b": looks("surprised"),
    r"\bdisgusted\b": looks("disgusted"),
    r"\b(scared|frightened)\b": looks("afraid"),
}
HAIR_TOLD = {r"\bhair\b", r"\bbald\b", r"\bbuzz cut\b", r"\bafro\b"}
GLASSES_TOLD = {r"\b(dark )?sunglasses\b", r"\b(eye)?glasses\b"}
RULES: dict[str, Claim] = {
    r"\b(man|boy|he|his)\b": lambda f: f.gender == "male",
    r"\b(woman|girl|she|her)\b": lambda f: f.gender == "female",
    r"\b(man|woman)\b": lambda f: f.age != "child",
    r"\b(boy|girl|little)\b": lambda f: f.age == "child",
    r"\byoung\b": lambda f: f.age in ("young", "child"),
    r"\bmiddle-aged\b": lambda f: f.age == "middle-aged",
    r"\b(old|elderly|senior)\b": lambda f: f.age == "old",
    r"\bbald\b": lambda f: f.hair_style == "bald" and scalp_seen(f),
    r"\bhair\b": hair_seen,
    r"\bbuzz cut\b": style_is("buzz cut"),
    r"\bafro\b": style_is("afro"),
    r"\bbun\b": style_is("bun"),
    r"\b(fringe|bangs)\b": lambda f: f.fringe and f.hair_style in ("short", "medium", "long") and f.hat == "none",
    **{rf"\b({word}) (hair\b|afro|buzz)|hair is ([\w-]+ )*({word})\b": hair_is(color) for word, color in HAIR_WORDS.items()},
    **{rf"\b({word}) (\w+ )?hair\b|hair is ({word})\b": style_is(*styles) for word, styles in LENGTHS.items()},
    **{rf"\b({'gr[ae]y' if color == 'gray' else color}) eyes|eyes are ({'gr[ae]y' if color == 'gray' else color})\b": (
        lambda f, color=color: f.eye_color == color and eyes_seen(f) and not f.eyes_closed) for color in EYE_COLORS},
    r"\b(closed eyes|eyes closed|eyes are (closed|shut))": lambda f: f.eyes_closed and eyes_seen(f),
    r"\beyebrows\b": lambda f: f.thick_eyebrows and eyes_seen(f),
    r"\b(full )?beard(ed)?\b": lambda f: f.beard == "full beard" and mouth_seen(f),
    r"\bmo?ustache\b": lambda f: f.beard == "moustache" and mouth_seen(f),
    r"\bgoatee\b": lambda f: f.beard == "goatee" and mouth_seen(f),
    r"\b(stubble|unshaven)\b": lambda f: f.beard == "stubble" and mouth_seen(f),
    r"\bclean-shaven\b": lambda f: f.beard == "none" and f.gender == "male" and f.age != "child" and mouth_seen(f),
    r"\bred lipstick|lipstick is red": lambda f: f.lipstick == "red" and mouth_seen(f),
    r"\bpink lipstick|lipstick is pink": lambda f: f.lipstick == "pink" and mouth_seen(f),
    r"\b(freckles|freckled)\b": lambda f: f.freckles and mouth_seen(f),
    **EXPRESSION_RULES,
    r"\b(dark )?sunglasses\b": lambda f: f.glasses == "sunglasses",
    r"\b(eye)?glasses\b": lambda f: f.glasses in ("round", "square"),
    r"\bround\b": lambda f: f.glasses == "round",
    r"\bsquare\b": lambda f: f.glasses == "square",
    r"(?<!knit )\bcap\b": lambda f: f.hat == "cap",
    r"\b(beanie|knit cap)\b": lambda f: f.hat == "beanie",
    r"\bhat\b": lambda f: f.hat in ("cap", "beanie"),
    r"\bheadband\b": lambda f: f.hat == "headband",
    r"\bmask\b": lambda f: f.covering == "face mask",
    r"\bearrings\b": lambda f: f.earrings and f.hair_style not in ("medium", "long", "afro"),
    r"\bt-shirt\b": lambda f: f.clothes == "t-shirt",
    r"(?<!t-)\bshirt\b": lambda f: f.clothes == "shirt",
    r"\bv-neck\b": lambda f: f.clothes == "v-neck",
    r"\bturtleneck\b": lambda f: f.clothes == "turtleneck",
    **{rf"\b{c} (cap|knit cap|beanie|hat|headband)\b": (lambda f, c=c: f.hat_color == c) for c in COLORS},
    **{rf"\b{c} (face )?mask\b": (lambda f, c=c: f.covering_color == c) for c in COLORS},
    **{rf"\b{c} (t-shirt|shirt|v-neck|turtleneck|top)\b": (lambda f, c=c: f.clothes_color == c) for c in COLORS},
    **{rf"\b{c} background|background is {c}\b": (
        lambda f, c=c: (f.background, f.background_color) == ("plain", c)) for c in COLORS},
    r"\bplain\b": lambda f: f.background == "plain",
    r"\bblurr(ed|y)\b": lambda f: f.background == "blurred",
    # The picture's left: a head turned to its own right, negative yaw. 18 and 12 degrees count as turned and raised.
    r"\b(looking|facing) (to the )?left\b": lambda f: f.yaw < -18,
    r"\b(looking|facing) (to the )?right\b": lambda f: f.yaw > 18,
    r"\b(looking|facing) up\b": lambda f: f.pitch > 12,
    r"\b(looking|facing) down\b": lambda f: f.pitch < -12,
    r"\bfacing (the camera|forward)\b": lambda f: abs(f.yaw) < 9 and abs(f.pitch) < 6,
    r"\blooking\b": lambda f: eyes_seen(f) and not f.eyes_closed,
    r"\b(light|fair) skin\b": lambda f: f.skin == "light",
    r"\b(tan|tanned) skin\b": lambda f: f.skin == "tan",
    r"\bbrown skin\b": lambda f: f.skin == "brown",
    r"\bdark skin\b": lambda f: f.skin == "dark",
}  # fmt: skip
# What claims nothing, or only together with a word that a rule above knows.
INNOCENT = set(re.findall(r"\S+", """
    a an and are is the this there he she his her with wearing wears has in on of to at front seems looks look facing looking
    camera forward background hair eyes eyebrows skin lipstick expression face portrait photo stock headshot picture image
    close-up profile people photography shows pair top smile head thick bushy
"""))  # fmt: skip
NEVER = r"\b(african|asian|caucasian|black (man|woman|boy|girl|people)|white (man|woman|boy|girl|people)|none|variation)\b"


@pytest.fixture(scope="module")
def described() -> list[tuple[Attributes, list[str]]]:
    faces = [draw_attributes(17, number) for number in range(FACES)]
    return [(face, captions(face, stream(17, number, CAPTION_STREAM), 5)) for number, face in enumerate(faces)]


COMPILED = {rule: re.compile(rule, re.IGNORECASE) for rule in RULES}


@cache
def spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """The rules whose claims a caption makes, and where."""
    found = {rule: [match.span() for match in pattern.finditer(text)] for rule, pattern in COMPILED.items()}
    return {rule: where for rule, where in found.items() if where}


def claims(text: str) -> list[str]:
    return list(spans(text))


def false_claims(face: Attributes, text: str) -> list[str]:
    return [rule for rule in claims(text) if not RULES[rule](face)]


def test_whatever_a_caption_says_is_true_and_in_sight(described: list[tuple[Attributes, list[str]]]) -> None:
    for face, texts in described:
        for text in texts:
            assert false_claims(face, text) == [], (text, face)
            assert not re.search(NEVER, text, re.IGNORECASE), text


def test_every_word_is_judged(described: list[tuple[Attributes, list[str]]]) -> None:
    for _, texts in described:
        for text in texts:
            judged = [span for where in spans(text).values() for span in where]
            words = [word for word in re.finditer(r"[\w-]*\w", text) if not any(a <= word.start() < b for a, b in judged)]
            left = {word.group().lower() for word in words} - INNOCENT
            assert not left, (text, left)


def test_the_judge_finds_what_is_false(described: list[tuple[Attributes, list[str]]]) -> None:
    """Captions of other faces must be caught often, and each rule must be able to fail."""
    wrong = sum(bool(false_claims(described[n - 1][0], text)) for n, (_, texts) in enumerate(described) for text in texts)
    assert wrong > 0.7 * FACES * 5
    used = Counter(rule for _, texts in described for text in texts for rule in claims(text))
    for rule, claim in RULES.items():
        assert used[rule] > 0, f"no caption makes the claim {rule}"
        assert not all(claim(face) for face, _ in described), f"{rule} is true of everybody"


def test_what_a_caption_names_is_in_the_picture() -> None:
    """The parsing mask of the rendered face shows some of everything that its captions name."""
    shown_by = {
        r"\b(sun|eye)?glasses\b": ("glasses",),
        r"\b(cap|beanie|hat|headband)\b": ("hat",),
        r"\bmask\b": ("face_mask",),
        r"\bearrings\b": ("earring",),
        r"\b(hair|afro|buzz cut|bun)\b": ("hair",),
        r"\beyebrows\b": ("left_brow", "right_brow"),
        r"\blipstick\b": ("upper_lip", "lower_lip"),
        rf"\b({'|'.join(EYE_COLORS)}|grey) eyes\b": ("left_eye", "right_eye"),
        r"\b(t-shirt|shirt|v-neck|turtleneck|top)\b": ("cloth",),
    }
    renderer = Renderer()
    named = Counter[str]()
    for number in range(40):
        face = draw_attributes(18, number)
        labels = renderer.draw(face, 64).labels
        text = " ".join(captions(face, stream(18, number, CAPTION_STREAM), 30, hidden(labels)))
        for words, classes in shown_by.items():
            if re.search(words, text):
                named[words] += 1
                assert any((labels == LABEL[name]).any() for name in classes), (words, face)
    assert set(named) == set(shown_by)


def test_captions_of_one_face_differ_and_depend_on_their_stream_alone(described: list[tuple[Attributes, list[str]]]) -> None:
    for number, (face, texts) in enumerate(described[:200]):
        assert len(set(texts)) == 5
        assert captions(face, stream(17, number, CAPTION_STREAM), 5) == texts
    # Even of a face that little can be said of, many can be had.
    plain = replace(described[0][0], hat="beanie", covering="face mask", glasses="sunglasses", background="gradient", yaw=12.0)
    assert len(set(captions(plain, stream(1), 40, hidden=("cloth",)))) == 40


PROMINENT = {"hair": HAIR_TOLD, "expression": EXPRESSION_RULES.keys(), "glasses": GLASSES_TOLD}
"""What is to be told first, and the rules any of which tells it."""


def tells(text: str) -> set[str]:
    """Which of the prominent things a caption tells."""
    said = set(claims(text))
    return {name for name, rules in PROMINENT.items() if said & rules}


def to_tell(face: Attributes) -> set[str]:
    """Which of them a face shows."""
    return {name for name, rules in PROMINENT.items() if any(RULES[rule](face) for rule in rules)}


def test_prominent_things_are_told_as_often_as_asked(described: list[tuple[Attributes, list[str]]]) -> None:
    """At 1 always and truly, at a half in half of the captions and those that come to it at random."""
    whole = {}
    for share in (0.0, 0.5, 1.0):
        complete = []
        for number, (face, _) in enumerate(described[:400]):
            for text in captions(face, stream(17, number, CAPTION_STREAM), 5, prominent=share):
                assert false_claims(face, text) == [], (text, face)
                assert share < 1 or tells(text) >= to_tell(face), (text, face)
                complete.append(tells(text) >= to_tell(face))
        whole[share] = np.mean(complete)
    assert whole[0.0] < 0.45
    # 2,000 captions: 0.05 is 4.5 standard errors.
    assert whole[0.5] == pytest.approx((1 + whole[0.0]) / 2, abs=0.05)


@pytest.mark.parametrize(("share", "told"), [(0.0, 0.45), (0.9, 0.88)])
def test_how_often_an_expression_is_told(share: float, told: float, described: list[tuple[Attributes, list[str]]]) -> None:
    """What docs/faces.md says."""
    texts = [
        text
        for number, (face, _) in enumerate(described[:1000])
        for text in captions(face, stream(17, number, CAPTION_STREAM), 5, prominent=share)
    ]
    assert np.mean(["expression" in tells(text) for text in texts]) == pytest.approx(told, abs=0.01)


def test_captions_are_what_they_were_before_anything_was_prominent() -> None:
    """Folders that earlier versions began are gone on with: the same numbers must give the same words."""
    said = [captions(draw_attributes(17, number), stream(17, number, CAPTION_STREAM), 1)[0] for number in range(3)]
    assert said == [
        "a man wearing earrings - stock photo",
        "Stock photo of a woman with black hair in a bun.",
        "The man has bushy eyebrows and is wearing a shirt. He has fair skin and a frightened look on his face.",
    ]


def test_grammar(described: list[tuple[Attributes, list[str]]]) -> None:
    for _, texts in described:
        for text in texts:
            assert text == text.strip()
            assert not re.search(r"  | [,.]|[,.|]{2}|,\S|\.\w|[{}]|\bNone\b", text), text
            for article, word in re.findall(r"\b([Aa]n?) (\w)", text):
                assert (article.lower() == "an") == (word.lower() in "aeiou"), text
            assert not re.search(
                r"\b(a|an) (eyes|eyebrows|hair|earrings|glasses|sunglasses|bangs|freckles|lipstick|stubble)\b", text
            ), text
            assert not re.search(r"\b(\w+) \1\b", text), text
            if text.endswith("."):
                sentences = text[:-1].split(". ")
                assert all(sentence[0].isupper() for sentence in sentences), text
            elif ". " in text:
                pytest.fail(f"sentences without a last period: {text}")
            if re.match(r"(He|She|His|Her|This|There|The)\b", text):
                assert text.endswith("."), text
            pronouns = {word.lower() for word in re.findall(r"\b(he|his|she|her)\b", text, re.IGNORECASE)}
            assert not (pronouns & {"he", "his"} and pronouns & {"she", "her"}), text


def test_many_forms_and_lengths(described: list[tuple[Attributes, list[str]]]) -> None:
    texts = [text for _, said in described for text in said]
    assert len(set(texts)) > 0.9 * len(texts)
    sentences = sum(text.endswith(".") and bool(re.match(r"(He|She|His|Her|This|There|The)\b", text)) for text in texts)
    tags = sum(" | " in text or not re.search(r"\b(an?|is|has|are|wears|looks|seems)\b", text, re.IGNORECASE) for text in texts)
    phrases = sum(
        bool(re.match(r"((stock photo|photo|portrait|close-up|headshot|picture|image) of )?an? ", text, re.IGNORECASE))
        for text in texts
    )
    for number in (sentences, tags, phrases):
        assert number > 0.12 * len(texts)
    said = [len(claims(text)) for text in texts]
    assert np.mean([count <= 4 for count in said]) > 0.2
    assert np.mean([count >= 10 for count in said]) > 0.1
    assert {text.split()[0] for text in texts} >= {
        "He",
        "She",
        "His",
        "Her",
        "This",
        "The",
        "A",
        "a",
        "portrait",
        "Stock",
        "stock",
    }


@pytest.mark.parametrize("options", [HAIR_STYLES, HAIR_COLORS, EYE_COLORS, BEARDS, GLASSES, HATS, EXPRESSIONS])
def test_every_option_can_be_spoken_of(options: tuple[str, ...], described: list[tuple[Attributes, list[str]]]) -> None:
    """Changing one option changes what is said: none is confused with another."""
    field = {HAIR_STYLES: "hair_style", HAIR_COLORS: "hair_color", EYE_COLORS: "eye_color", BEARDS: "beard", GLASSES: "glasses",
             HATS: "hat", EXPRESSIONS: "expression"}[options]  # fmt: skip
    bare = replace(
        described[0][0], gender="male", age="young", hair_style="short", hat="none", covering="none", glasses="none",
        eyes_closed=False, fringe=False,
    )  # fmt: skip
    told = {}
    for option in options:
        face = replace(bare, **{field: option})
        text = " ".join(captions(face, stream(3, 4), 60))
        assert false_claims(face, text) == []
        told[option] = frozenset(claims(text))
    assert len(set(told.values())) == len(options)


def test_what_the_mask_does_not_show_is_hidden(described: list[tuple[Attributes, list[str]]]) -> None:
    labels = np.zeros((64, 64), np.uint8)
    assert hidden(labels) == {"cloth", "earring"}
    labels[:1, :41] = LABEL["cloth"]
    labels[2, :3] = LABEL["earring"]
    assert hidden(labels) == frozenset()
    face = replace(described[0][0], earrings=True, hair_style="bun", hat="none")
    assert "earrings" in " ".join(captions(face, stream(5), 60))
    text = " ".join(captions(face, stream(5), 60, hidden=("cloth", "earring")))
    assert not re.search(r"earrings|shirt|v-neck|turtleneck|\btop\b", text)
