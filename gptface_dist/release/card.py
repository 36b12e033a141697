"""Provenance of a release: stored in its ``config.json``, shown in its ``README.md``."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.objective import Objective
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE
from gptface_dist.tokenizers.vocabulary import Vocabulary

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Card:
    """Provenance of a release; the model card shows missing facts as unknown."""

    name: str = "GPTFace"
    """Title of the model card."""
    license: str = UNKNOWN
    """Licence of the weights: an identifier of the Hugging Face hub, such as ``mit``, or words."""
    data_license: str = UNKNOWN
    """Licence of the training data."""
    data: list[str] = field(default_factory=list)
    """Sources of the training data, one an entry."""
    step: int | None = None
    """Optimizer steps."""
    samples: int | None = None
    """Samples trained on."""
    tokens: int | None = None
    """Tokens trained on, without padding."""
    losses: dict[str, float] = field(default_factory=dict)
    """Last losses and metrics, by name."""
    layout: str | None = None
    """Parallel layout of the run, as ``str(Layout)``."""
    ema: bool = False
    """Whether the weights are the exponential moving average (EMA) instead of the last step's."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software that trained it."""
    parity: dict[str, float] = field(default_factory=dict)
    """Relative error of the heads' outputs, by name, to those that the training run recorded."""
    rounding: dict[str, float] = field(default_factory=dict)
    """Relative error of the released weights' outputs to those of the float32 weights they were rounded from."""
    config: dict[str, Any] = field(default_factory=dict)
    """The training run's resolved configuration."""


def facts(
    card: Card, objective: Objective, options: ModelOptions, vocabulary: Vocabulary, grid: tuple[int, int], dtype: str
) -> dict[str, str]:
    """The most important facts of a release by title, formatted for people; also for a checkpoint."""
    return {
        "Parameters": f"{objective.parameter_count(options, vocabulary):,} ({dtype})",
        "Objective": f"{objective.name}: {', '.join(f'{term.name} ({term.items})' for term in objective.terms)}",
        "Transformer": f"{options.layers} layers, width {options.hidden}, {options.heads} heads, "
        f"feed-forward {options.ffn} ({options.activation}{', QK-norm' if options.qk_norm else ''})",
        "Vocabulary": f"{vocabulary.size:,}: {vocabulary.text_size:,} of text, {vocabulary.image_codes:,} of images, specials",
        "Images": f"{grid[0]} x {grid[1]} codes",
        "Longest text": f"{options.text_positions - SPECIALS_PER_SEQUENCE} tokens",
        "Weights": "running average over steps" if card.ema else "of the last step",
        "Steps": _number(card.step),
        "Samples": _number(card.samples),
        "Tokens": _number(card.tokens),
        "Layout": card.layout or UNKNOWN,
        "Versions": ", ".join(f"{name} {version}" for name, version in card.versions.items()) or UNKNOWN,
        "Licence of the weights": card.license,
        "Licence of the data": card.data_license,
    }


def markdown(card: Card, rows: dict[str, str]) -> str:
    """The model card, with the hub's front matter; ``rows`` is the result of :func:`facts`."""
    # The hub knows a fixed list of licence identifiers; anything else is `other` with a name.
    licence = (
        ["license: other", f"license_name: {_yaml(card.license)}"]
        if " " in card.license
        else [f"license: {_yaml(card.license)}"]
    )
    head = ["---", *licence, "library_name: gptface_dist", "pipeline_tag: text-to-image", "tags: [gptface, faces]", "---"]
    losses = [f"| {name} | {value:.6g} |" for name, value in card.losses.items()]
    lines = [
        *head,
        "",
        f"# {card.name}",
        "",
        "One bidirectional transformer that reads and writes text and face images, a reconstruction of Li et al.,",
        '["GPTFace"](https://arxiv.org/abs/2510.18345): the sizes and hyper-parameters of that paper are not public.',
        "",
        "    from gptface_dist import release",
        "    found = release.load(FOLDER)  # .model, .text, .image, .vocabulary",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Training data",
        "",
        *([f"- {source}" for source in card.data] or ["Unknown."]),
        "",
        "## Last losses",
        "",
        *(["| | |", "|---|---|", *losses] if losses else ["Unknown."]),
        "",
        "## Checked",
        "",
        _parity(card),
        "",
        "`manifest.json` has the SHA-256 of every file; `gptface inspect FOLDER --verify` compares them.",
        "",
    ]
    return "\n".join(lines)


def _parity(card: Card) -> str:
    if not card.parity:
        return "Saved from the plain model itself: there was no training checkpoint to compare with."
    errors = ", ".join(f"{name} {error:.1e}" for name, error in card.parity.items())
    rounding = ", ".join(f"{name} {error:.1e}" for name, error in card.rounding.items())
    return (
        "On a fixed batch, the plain model with the last step's float32 weights gives the outputs that the distributed model "
        f"gave when the checkpoint was written, up to a relative error of: {errors}. The weights released here give the "
        f"outputs of the float32 weights that they were rounded from up to: {rounding}."
    )


def _number(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _yaml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def to_json(card: Card) -> dict[str, Any]:
    """The card as a mapping of JSON values."""
    return asdict(card)


def from_json(raw: dict[str, Any]) -> Card:
    """Parse a result of :func:`to_json`, without keys of newer versions; ``TypeError`` where it is no mapping."""
    return Card(**{name: raw[name] for name in Card.__dataclass_fields__ if name in raw})
