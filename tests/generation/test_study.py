"""The study: statistics by hand, the words of prompts, and a judge that learns its labels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gptface_dist.data.folder import ShardFolder
from gptface_dist.errors import UserError
from gptface_dist.faces.attributes import draw_attributes
from gptface_dist.faces.captions import captions
from gptface_dist.faces.corpus import Recipe, Rendering
from gptface_dist.generation import Generator, Sampling
from gptface_dist.generation.study import report
from gptface_dist.generation.study.captions import said
from gptface_dist.generation.study.judge import judged, read_faces, train_judge
from gptface_dist.generation.study.statistics import balanced, chance, gain, mean, share
from gptface_dist.generation.study.study import StudyOptions, study
from gptface_dist.generation.study.traits import TRAITS, UNKNOWN, changed, prompt, random_values, values_of


def test_wilson_interval_by_hand() -> None:
    """Wilson's interval of 15 of 20: 0.531 to 0.888 (as tables and other software give it)."""
    interval = share([[1] * 8 + [0] * 2, [1] * 7 + [0] * 3])
    assert interval.share == 0.75
    assert (interval.low, interval.high) == (pytest.approx(0.5313, abs=5e-5), pytest.approx(0.8881, abs=5e-5))
    assert interval.spread == pytest.approx(0.1 / np.sqrt(2))
    assert interval.trials == 20
    assert share([[1.0] * 10]).high == pytest.approx(1.0)
    assert share([[0.0] * 10]).low == 0.0


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = [interval.low <= 0.3 <= interval.high for interval in (share([rng.random(60) < 0.3]) for _ in range(2000))]
    assert 0.93 < np.mean(covered) < 0.975


def test_chance_is_the_agreement_of_shuffled_pictures() -> None:
    rng = np.random.default_rng(1)
    wanted, seen = rng.integers(0, 3, 500).tolist(), rng.choice(3, 500, p=[0.7, 0.2, 0.1]).tolist()
    shuffled = np.mean([np.mean(np.array(wanted) == rng.permutation(seen)) for _ in range(400)])
    assert chance(wanted, seen) == pytest.approx(shuffled, abs=0.003)


def test_balanced_accuracy_by_hand() -> None:
    """Value 0: 3 of 4, value 2: 1 of 2, value 1 does not occur, the last trial is unknown."""
    assert balanced([0, 0, 0, 0, 2, 2, UNKNOWN], [0, 0, 0, 1, 2, 0, 2]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert np.isnan(balanced([UNKNOWN], [0]))


def test_gain_of_pairs() -> None:
    rng = np.random.default_rng(2)
    first = [rng.random(150), rng.random(150)]
    gained = gain(first, [scores + 0.1 + 0.02 * rng.standard_normal(150) for scores in first])
    assert gained.low < 0.1 < gained.high
    assert gained.high - gained.low < 0.01, "what pairs share does not widen the interval"
    apart = gain([np.zeros(3), np.zeros(3)], [np.full(3, 0.1), np.full(3, 0.3)])
    assert apart.mean == pytest.approx(0.2)
    assert apart.spread == pytest.approx(0.2 / np.sqrt(2))
    assert str(apart).startswith("+20.0% ± 14.1% (+")


def test_means_over_seeds_by_hand() -> None:
    assert f"{mean([1.0, 2.0, 4.5]):.2f}" == "2.50 ± 1.80"
    assert f"{mean([3.0]):.1%}" == "300.0%", "one seed has no spread"


def test_prompts_name_all_traits() -> None:
    values = {"gender": 0, "glasses": 1, "hair": 3, "expression": 3}
    assert prompt(values) == "An angry woman with red hair, wearing glasses."
    assert prompt({"gender": 1, "glasses": 0, "hair": 0, "expression": 0}) == "A man with black hair and a neutral expression."
    every = [dict(zip(TRAITS, row, strict=True)) for row in itertools.product(*(range(len(v)) for v in TRAITS.values()))]
    assert len({prompt(values) for values in every}) == len(every) == 2 * 2 * 5 * 7, "different values, different words"


def test_prompts_ask_for_all_values_equally_often() -> None:
    """All values then agree equally often by chance, and no trait predicts another."""
    drawn = random_values(700, np.random.default_rng(0))
    for name, values in TRAITS.items():
        assert (np.bincount([entry[name] for entry in drawn]) == 700 // len(values)).all()
        assert chance([entry[name] for entry in drawn], [0] * 9 + [1]) == pytest.approx(1 / len(values))
    for first, second in itertools.combinations(TRAITS, 2):
        assert abs(np.corrcoef([d[first] for d in drawn], [d[second] for d in drawn])[0, 1]) < 0.12
    assert random_values(700, np.random.default_rng(1)) != drawn
    odd = random_values(71, np.random.default_rng(0))
    assert sorted(np.bincount([entry["hair"] for entry in odd])) == [14, 14, 14, 14, 15]


@given(seed=st.integers(0, 1000), trait=st.sampled_from(list(TRAITS)))
def test_a_changed_trait_is_another_and_the_only_one(seed: int, trait: str) -> None:
    (values,) = random_values(1, np.random.default_rng(seed))
    other = changed(values, trait, np.random.default_rng(seed))
    assert [name for name in TRAITS if other[name] != values[name]] == [trait]
    assert 0 <= other[trait] < len(TRAITS[trait])


@pytest.mark.parametrize(
    ("text", "gender", "hair", "expression"),
    [
        ("Portrait of a smiling young woman with long red hair, wearing a green cap", {0}, {3}, {1}),
        ("He has a black afro. His expression is neutral.", {1}, {0}, {0}),
        ("Her hair is short and grey. She looks unhappy.", {0}, {4}, {2}),
        ("boy | hair in a bun | scared face | red background", {1}, set(), {6}),
        ("a person in front of a black background, wearing a white top", set(), set(), set()),
        ("a woman. He has blond hair and brown hair", {0, 1}, {1, 2}, set()),
    ],
)
def test_what_captions_name(text: str, gender: set[int], hair: set[int], expression: set[int]) -> None:
    assert (said(text, "gender"), said(text, "hair"), said(text, "expression")) == (gender, hair, expression)


def test_true_captions_name_only_the_truth() -> None:
    """Of the renderer's own captions: what they name is so, and all values of all traits are named by some."""
    named: dict[str, set[int]] = {name: set() for name in ("gender", "hair", "expression")}
    for number in range(400):
        face = draw_attributes(8, number)
        truth = values_of(face.to_json(), 1.0)
        for text in captions(face, np.random.default_rng(number), 3, prominent=0.9):
            for name, seen in named.items():
                values = said(text, name)
                assert values <= {truth[name]}, (text, name)
                seen |= values
    assert {name: len(seen) for name, seen in named.items()} == {"gender": 2, "hair": 5, "expression": 7}


def test_traits_of_attributes() -> None:
    face = draw_attributes(0, 3).to_json() | {
        "gender": "male", "glasses": "sunglasses", "hair_color": "white", "expression": "sad", "covering": "none",
    }  # fmt: skip
    assert values_of(face, 0.2) == {"gender": 1, "glasses": 1, "hair": 4, "expression": 2}
    hidden = values_of(face | {"covering": "face mask", "glasses": "none"}, 0.0)
    assert hidden == {"gender": 1, "glasses": 0, "hair": UNKNOWN, "expression": UNKNOWN}


def test_the_judge_learns_and_skips_unknown_values() -> None:
    """Pictures whose brightness is the hair, whose colour the gender; the expression is never known."""
    rng = np.random.default_rng(3)
    values = [entry | {"expression": UNKNOWN} for entry in random_values(192, rng)]
    pictures = [
        (np.full((24, 24, 3), 40 + 40 * entry["hair"]) + np.array([30 * entry["gender"], 0, 0]) + rng.normal(0, 5, (24, 24, 3)))
        .clip(0, 255)
        .astype(np.uint8)
        for entry in values
    ]
    judge = train_judge(pictures[:128], values[:128], 20, 0)
    seen = judged(judge, pictures[128:])
    for name in ("gender", "hair"):
        assert np.mean([s[name] == t[name] for s, t in zip(seen, values[128:], strict=True)]) > 0.9
    again = judged(train_judge(pictures[:128], values[:128], 20, 0), pictures[128:])
    assert again == seen


def test_the_judge_treats_all_values_as_equally_likely() -> None:
    """Brightness tells two values apart, not quite; one of ten training pictures has the second value.

    With means two deviations apart, who guesses best when both are alike finds 84 % of either. Who goes by how often they
    were seen finds 46 % of the second (Bayes' rule).
    """
    rng = np.random.default_rng(4)

    def picture(value: int) -> np.ndarray:
        return np.full((16, 16, 3), rng.normal(108 + 40 * value, 20)).clip(0, 255).astype(np.uint8)

    rare = [dict.fromkeys(TRAITS, UNKNOWN) | {"glasses": int(number % 10 == 0)} for number in range(640)]
    judge = train_judge([picture(entry["glasses"]) for entry in rare], rare, 12, 0)
    truth = [number % 2 for number in range(400)]
    seen = [entry["glasses"] for entry in judged(judge, [picture(value) for value in truth])]
    for value in (0, 1):
        assert balanced([t if t == value else UNKNOWN for t in truth], seen) == pytest.approx(0.84, abs=0.13)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    folder = tmp_path_factory.mktemp("faces")
    for _ in Rendering(folder, 40, Recipe(5, 32)).run():
        pass
    return ShardFolder.open(str(folder))


def test_the_whole_study_runs(generator: Generator, faces: ShardFolder, tmp_path: Path) -> None:
    options = StudyOptions(prompts=9, edits=2, seeds=2, judge_faces=32, held_out=8, epochs=1, steps=2)
    calls: dict[str, list[int]] = {}

    def progress(doing: str, total: int):  # type: ignore[no-untyped-def]
        calls[doing] = [total, 0]
        return lambda: calls[doing].__setitem__(1, calls[doing][1] + 1)

    result = study(generator, faces, options, progress)
    exact = {"reading faces", "reconstructing", "training judges", "drawing"}
    assert all(total == done for doing, (total, done) in calls.items() if doing in exact), calls
    assert exact < set(calls)
    assert all(edit.outside.share == 1 for edit in result.edits.values())
    report.make_folder(tmp_path / "study")
    report.write(result, tmp_path / "study", "gptface study ...")
    text = (tmp_path / "study" / "study.md").read_text()
    for mode in result.modes:
        assert f"| {mode} | " in text
    assert "| glasses on | " in text
    prompted = [prompt(values) for values in random_values(9, np.random.default_rng(0))]
    assert result.shown == prompted[:8]
    drawn = generator.generate(prompted[0], 1, Sampling(2))[0]
    assert (next(iter(result.modes.values())).pictures[0] == drawn.pixels).all()
    assert calls["training judges"][0] == 2 * 2, "a judge for each of 2 seeds, 2 batches of 32"
    with Image.open(tmp_path / "study" / "study.png") as opened:
        assert min(opened.size) > 8


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("a file")
    for path in (tmp_path / "study", tmp_path / "study" / "deeper"):
        with pytest.raises(UserError, match="cannot be a folder for the study"):
            report.make_folder(path)


def test_other_shards_are_refused(faces: ShardFolder) -> None:
    with pytest.raises(UserError, match="holds 40 faces, 41 are needed"):
        read_faces(faces, 41, 8)
    with pytest.raises(UserError, match="prompts must be at least 1"):
        StudyOptions(prompts=0)


def test_faces_carry_their_mask_and_traits(faces: ShardFolder) -> None:
    for number, face in enumerate(read_faces(faces, 5, 32)):
        truth = draw_attributes(5, number)
        assert face.values["gender"] == int(truth.gender == "male")
        assert face.labels.shape == face.pixels.shape[:2] == (32, 32)
        assert face.labels.max() < 19
    assert read_faces(faces, 1, 8)[0].labels.shape == (8, 8)
