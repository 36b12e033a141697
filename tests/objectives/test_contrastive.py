"""The contrastive objective: its closed form against autograd, two passes against one, and the wrong ways that are known."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.made_up import made_up_block
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Block
from gptface_dist.engine import parity, parity_case, parity_reference
from gptface_dist.engine.parity_case import GRID, MODEL, VOCABULARY
from gptface_dist.errors import UserError
from gptface_dist.model.parameters import initialise
from gptface_dist.objectives.contrastive import Contrastive, LogitScale, PairBatch
from gptface_dist.parallel.layout import Layout
from gptface_dist.sequence import IMAGE, TEXT

OBJECTIVE = Contrastive(projection=8)
DATA = DataConfig("", [], batch=BatchOptions(text_length=20, pad_to_multiple_of=4))


def features(number: int, scale: float, alike: bool = False) -> dict[str, Tensor]:
    """A survey in float64, whose entries are leaves; with ``alike`` some captions are equal."""
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(number, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    t = torch.full((1,), math.log(scale), dtype=torch.float64, requires_grad=True)
    ids = torch.arange(number) // (3 if alike else 1)
    return {"text": F.normalize(raw[0], dim=-1), "image": F.normalize(raw[1], dim=-1), "log_scale": t, "caption_id": ids}


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_the_closed_form_is_what_autograd_finds(alike: bool, scale: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptface_dist.objectives.contrastive.CHUNK", chunk)
    surveyed = features(12, scale, alike)
    names = ("text", "image", "log_scale")
    (whole,) = OBJECTIVE.coupled_losses(surveyed | {"log_scale": surveyed["log_scale"].expand(12)})
    wanted = torch.autograd.grad(whole.loss, [surveyed[name] for name in names])
    given = {name: value.detach() for name, value in surveyed.items()} | {
        "log_scale": surveyed["log_scale"].detach().expand(12)
    }
    # As three ranks would: each derives its own part.
    parts = [OBJECTIVE.constants(given, slice(start, start + 4)) for start in (0, 4, 8)]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # They are handed over in float32.
    assert float(found["loss"].sum()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    assert float(found["right"].sum()) == float(whole.correct)
    assert float(found["log_scale"].sum()) == pytest.approx(float(wanted[2]), rel=1e-5)
    for name, gradient in zip(names[:2], wanted, strict=False):
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6


def test_the_loss_is_the_textbooks() -> None:
    surveyed = features(6, 10.0)
    z = 10 * (surveyed["image"] @ surveyed["text"].T).detach().numpy()
    wanted = 0.0
    for i in range(6):
        wanted -= z[i, i] - (np.log(np.exp(z[i]).sum()) + np.log(np.exp(z[:, i]).sum())) / 2
    (whole,) = OBJECTIVE.coupled_losses(surveyed | {"log_scale": surveyed["log_scale"].expand(6)})
    assert float(whole.loss.detach()) == pytest.approx(wanted, rel=1e-12)
    assert whole.items == 6


def blocks(number: int, size: int) -> list[Block[Any]]:
    """Consecutive samples of one run, in blocks."""
    rng = np.random.default_rng(0)
    return [made_up_block(rng, VOCABULARY, GRID, 20, block, size, "run") for block in range(number)]


def batches(number: int, size: int) -> list[PairBatch[Tensor]]:
    """Micro-batches of the same samples, whatever the sizes."""
    collate = OBJECTIVE.collate(DATA, VOCABULARY, GRID)
    return [collate([block]).tensors() for block in blocks(number, size)]


def test_rows_are_text_alone_and_image_alone() -> None:
    (block,) = blocks(1, 5)
    batch = OBJECTIVE.collate(DATA, VOCABULARY, GRID)([block])
    assert (batch.rows, batch.samples) == (10, 5)
    for number, sample in enumerate(block.samples):
        caption, codes = sample.value.captions[0][sample.value.captions[0] >= 0], sample.value.codes
        text, image = 2 * number, 2 * number + 1
        end = len(caption) + 2
        assert batch.tokens[text, :end].tolist() == [VOCABULARY.cls_id, *caption, VOCABULARY.sep_id]
        assert batch.lengths[text] == end
        assert (batch.segments[text, :end] == TEXT).all()
        ids = (codes.reshape(-1) + VOCABULARY.image_offset).tolist()
        whole = [VOCABULARY.cls_id, VOCABULARY.sep_id, *ids, VOCABULARY.sep_id]
        assert batch.tokens[image, : len(whole)].tolist() == whole
        assert (batch.segments[image, 2 : 2 + codes.size] == IMAGE).all()
    assert len(set(batch.caption_id.tolist())) == 5


def test_equal_captions_have_one_id_and_others_another() -> None:
    (block,) = blocks(1, 4)
    captions = [sample.value.captions for sample in block.samples]
    object.__setattr__(block.samples[2].value, "captions", captions[0])
    ids = OBJECTIVE.collate(DATA, VOCABULARY, GRID)([block]).caption_id
    assert ids[2] == ids[0]
    assert len(set(ids.tolist())) == 3


def model() -> Any:
    made = OBJECTIVE.model(MODEL, VOCABULARY)
    initialise(made, 0)
    return made.double()


def two_passes(made: Any, micro: list[PairBatch[Tensor]], wrong: Callable[[int, dict[str, Tensor]], Any]) -> Any:
    """As the engine does, in one process; ``wrong`` may spoil a micro-batch's constants."""

    def survey(batch: PairBatch[Tensor]) -> Any:
        x = made.encode(OBJECTIVE.embed(made.embeddings, batch), batch.lengths)
        return x, OBJECTIVE.survey(x, batch, made)

    with torch.no_grad():
        surveyed = [survey(batch)[1] for batch in micro]
    whole = {name: torch.cat([each[name] for each in surveyed]) for name in surveyed[0]}
    constants = OBJECTIVE.constants(whole, slice(0, len(whole["text"])))
    made.zero_grad()
    start = 0
    for number, batch in enumerate(micro):
        part = {name: value[start : start + batch.samples] for name, value in constants.items()}
        start += batch.samples
        (loss,) = OBJECTIVE.losses(survey(batch)[0], batch, made, wrong(number, part))
        loss.loss.backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    whole = math.sqrt(sum(float(g.norm()) ** 2 for g in other.values()))
    assert one.keys() == other.keys()
    return max(float((one[name] - g).norm()) / max(float(g.norm()), 1e-3 * whole) for name, g in other.items())


def one_pass(made: Any, micro: list[PairBatch[Tensor]]) -> dict[str, Tensor]:
    features = [made.encode(OBJECTIVE.embed(made.embeddings, batch), batch.lengths) for batch in micro]
    surveyed = [OBJECTIVE.survey(x, batch, made) for x, batch in zip(features, micro, strict=True)]
    (whole,) = OBJECTIVE.coupled_losses({name: torch.cat([each[name] for each in surveyed]) for name in surveyed[0]})
    made.zero_grad()
    whole.loss.backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_two_passes_are_one_whatever_the_micro_batches() -> None:
    made = model()
    wanted = one_pass(made, batches(1, 8))
    for number, size in ((1, 8), (2, 4), (4, 2), (8, 1)):
        # Surveyed features and constants are float32.
        assert worst(two_passes(made, batches(number, size), lambda _, part: part), wanted) < 1e-5


MUTANTS: dict[str, Callable[[int, dict[str, Tensor]], dict[str, Tensor]]] = {
    "gathered in another order": lambda n, part: part | {"text": part["text"].flip(0), "image": part["image"].flip(0)},
    "temperature once a micro-batch": lambda n, part: part | {"log_scale": part["log_scale"] * 4},
    "no gradient through one side": lambda n, part: part | {"text": torch.zeros_like(part["text"])},
    "a mean over ranks that is not undone": lambda n, part: part | {k: part[k] / 2 for k in ("text", "image", "log_scale")},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_ways_are_found(name: str) -> None:
    made = model()
    wanted = one_pass(made, batches(1, 8))
    assert worst(two_passes(made, batches(4, 2), MUTANTS[name]), wanted) > 0.1


def test_negatives_of_one_micro_batch_are_another_loss() -> None:
    made = model()
    wanted, parts = one_pass(made, batches(1, 8)), [one_pass(made, [batch]) for batch in batches(4, 2)]
    summed = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in wanted}
    assert worst(summed, wanted) > 0.1


def test_the_scale_is_kept_in_its_range_and_comes_back() -> None:
    head = LogitScale()
    with torch.no_grad():
        head.log_scale.fill_(6.0)
    assert float(head().exp()) == pytest.approx(100)
    for sign, gradient in ((-1.0, 0.0), (1.0, 1.0)):
        head.zero_grad()
        (sign * head()).sum().backward()
        # Descent along a negative gradient would raise it further; a positive one brings it back.
        assert float(head.log_scale.grad) == gradient


def test_its_model_has_no_token_head_and_starts_at_clips_scale() -> None:
    table = {entry.name: entry for entry in OBJECTIVE.parameters(MODEL, VOCABULARY)}
    assert not any(name.startswith(("token_head", "itm_head")) for name in table)
    assert not table["embeddings.word.weight"].on_last_stage
    scale = table["logit_scale.log_scale"]
    assert (float(scale.initial(0).exp()), scale.decay, scale.on_last_stage) == (pytest.approx(1 / 0.07), False, True)
    assert table["text_projection.weight"].decay


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss.text is no term of the objective contrastive: it has itc"):
        Contrastive({"text": 1.0})
    with pytest.raises(UserError, match="projection must be at least 1"):
        Contrastive(projection=0)


def test_parity_is_of_hard_pairs() -> None:
    """When pairs are solved, or all alike, gradients are rounding noise."""
    case = parity_case.Case(Layout(zero=0), objective=Contrastive())
    norms = [norm for _, norm, _ in parity_reference.reference_steps(case, parity.OPTIMIZER)]
    assert min(norms) > 0.5
