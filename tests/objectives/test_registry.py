"""Objectives by name: what there is not is refused with what there is."""

from pathlib import Path

import pytest

from gptface_dist.config import load_config
from gptface_dist.errors import UserError
from gptface_dist.objectives.contrastive import Contrastive
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.registry import OBJECTIVES, ObjectiveOptions, build_objective
from gptface_dist.training.config import Config


def test_each_is_the_class_of_its_file_and_name() -> None:
    for name in OBJECTIVES:
        assert build_objective(ObjectiveOptions(name), {}).name == name


def test_weights_are_by_term_and_default_to_one() -> None:
    assert build_objective(ObjectiveOptions(), {"itm": 0.3}).weights == {"text": 1.0, "image": 1.0, "itm": 0.3}
    assert build_objective(ObjectiveOptions("contrastive", {"projection": 7}), {}) == Contrastive(projection=7)


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        (ObjectiveOptions("clip"), {}, "objective.name must be one of milm_itm, contrastive, got 'clip'"),
        (ObjectiveOptions("milm_itm", {"width": 3}), {}, "objective.options.width is no option of the objective milm_itm"),
        (ObjectiveOptions("contrastive", {"projecton": 3}), {}, "there are projection"),
        (ObjectiveOptions(), {"match": 1.0}, "loss.match is no term of the objective milm_itm: it has text, image, itm"),
        (ObjectiveOptions("contrastive"), {"itm": 1.0}, "loss.itm is no term of the objective contrastive: it has itc"),
    ],
)
def test_what_there_is_not_is_refused(options: ObjectiveOptions, weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_objective(options, weights)
    assert "\n" not in str(error.value)


def test_a_run_names_its_terms(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {tokenizers: t, sources: [{path: p}]}\n")
    config = load_config(Config, path, ["loss.itm=0.3"])
    assert config.loss == {"text": 1.0, "image": 1.0, "itm": 0.3}
    assert isinstance(config.build_objective(), MilmItm)
    contrast = load_config(Config, path, ["objective.name=contrastive", "objective.options.projection=16"])
    assert contrast.build_objective() == Contrastive({"itc": 1.0}, 16)
    with pytest.raises(UserError, match=r"loss\.mtch is no term"):
        load_config(Config, path, ["loss.mtch=1"])
