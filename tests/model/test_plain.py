"""The plain model against a second implementation in float64 numpy, written from the documentation alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from gptface_dist.data.batch import MaskedBatch
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise, parameters
from gptface_dist.model.plain import GPTFace
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.objective import LossSum
from gptface_dist.sequence import IGNORE, IMAGE, PADDING, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)
SMALL = ModelOptions(layers=2, hidden=16, heads=4, ffn=24, text_positions=16, rows=3, columns=4, init_std=0.3)
VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, activation="swiglu"),
    dataclasses.replace(SMALL, qk_norm=True),
]


def make(options: ModelOptions = SMALL, seed: int = 0) -> GPTFace:
    model = GPTFace(options, VOCABULARY)
    initialise(model, seed)
    with torch.no_grad():
        # Away from zeros and ones, so that no bias or norm is without effect.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def batch(texts: list[int], pad_to: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sequences with captions of the given lengths and a 3 x 4 image."""
    rng = np.random.default_rng(seed)
    shape = (len(texts), pad_to)
    tokens, segments = np.full(shape, VOCABULARY.pad_id), np.full(shape, PADDING)
    labels, positions = np.full(shape, IGNORE), np.zeros((*shape, 2), dtype=np.int64)
    lengths = np.array([length + 12 + 3 for length in texts])
    for row, text in enumerate(texts):
        at = text + 2
        tokens[row, 0], tokens[row, text + 1], tokens[row, at + 12] = VOCABULARY.cls_id, VOCABULARY.sep_id, VOCABULARY.sep_id
        tokens[row, 1 : text + 1] = rng.integers(40, size=text)
        tokens[row, at : at + 12] = 40 + rng.integers(24, size=12)
        segments[row, : at + 13] = TEXT
        segments[row, at : at + 12] = IMAGE
        positions[row, :at, 0] = np.arange(at)
        positions[row, at : at + 12] = [[r, c] for r in range(3) for c in range(4)]
        positions[row, at + 12, 0] = at
        masked = rng.random(pad_to) < 0.4
        masked[[0, text + 1]] = False
        masked[at + 12 :] = False
        labels[row, masked] = tokens[row, masked]
        tokens[row, masked] = VOCABULARY.mask_id
    itm_label = rng.integers(2, size=len(texts))
    arrays = {"tokens": tokens, "segments": segments, "positions": positions, "lengths": lengths, "labels": labels}
    return {name: torch.as_tensor(array) for name, array in {**arrays, "itm_label": itm_label}.items()}


def inputs(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return data["tokens"], data["segments"], data["positions"], data["lengths"]


def losses(model: GPTFace, data: dict[str, torch.Tensor]) -> dict[str, LossSum]:
    """By term."""
    masked = [((data["labels"] >= ids.start) & (data["labels"] < ids.stop)).nonzero() for ids in (range(40), range(40, 64))]
    batch = MaskedBatch(*inputs(data), True, data["labels"], data["itm_label"], *masked)
    objective = MilmItm()
    sums = objective.losses(model(*inputs(data)), batch, model, {})
    return {term.name: each for term, each in zip(objective.terms, sums, strict=True)}


class Oracle:
    """GPTFace for one sequence at a time, token by token, head by head, in float64."""

    def __init__(self, model: GPTFace):
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.o = model.options

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.o.norm_eps) * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    @staticmethod
    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + erf(x / math.sqrt(2)))

    def features(self, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
        x = np.stack([self.embed(*token) for token in zip(tokens, segments, positions, strict=True)])
        for i in range(self.o.layers):
            x = x + self.linear(self.attend(self.norm(x, f"layers.{i}.attention_norm"), i), f"layers.{i}.out_proj")
            inner = self.linear(self.norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp_in")
            if self.o.activation == "swiglu":
                gate, up = inner[:, : self.o.ffn], inner[:, self.o.ffn :]
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                inner = self.gelu(inner)
            x = x + self.linear(inner, f"layers.{i}.mlp_out")
        return self.norm(x, "final_norm")

    def embed(self, token: int, segment: int, position: np.ndarray) -> np.ndarray:
        e = {name: self.w[f"embeddings.{name}.weight"] for name in ("word", "segment", "text_position", "row", "column")}
        where = e["row"][position[0]] + e["column"][position[1]] if segment == IMAGE else e["text_position"][position[0]]
        return e["word"][token] + e["segment"][segment] + where

    def attend(self, x: np.ndarray, i: int) -> np.ndarray:
        qkv = self.linear(x, f"layers.{i}.qkv")
        size, heads = self.o.head_size, []
        for h in range(self.o.heads):
            q, k, v = (qkv[:, (3 * h + part) * size : (3 * h + part + 1) * size] for part in range(3))
            if self.o.qk_norm:
                q, k = self.norm(q, f"layers.{i}.q_norm"), self.norm(k, f"layers.{i}.k_norm")
            scores = q @ k.T / math.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return np.concatenate(heads, -1)

    def token_logits(self, x: np.ndarray, ids: range) -> np.ndarray:
        features = self.norm(self.gelu(self.linear(x, "token_head.dense")), "token_head.norm")
        return features @ self.w["embeddings.word.weight"][ids].T + self.w["token_head.bias"][ids]


@pytest.mark.parametrize("options", VARIANTS, ids=["gelu", "swiglu", "qk_norm"])
def test_features_and_losses_are_the_oracles(options: ModelOptions) -> None:
    model, data = make(options).double(), batch([5, 9, 1], pad_to=28)
    features = model(*inputs(data))
    sums = losses(model, data)
    oracle = Oracle(model)
    wanted = {"text": [0.0, 0, 0], "image": [0.0, 0, 0], "itm": [0.0, 0, 0]}
    for row, length in enumerate(data["lengths"].tolist()):
        x = oracle.features(*(data[name][row, :length].numpy() for name in ("tokens", "segments", "positions")))
        assert np.allclose(features[row, :length].detach().numpy(), x, atol=1e-10)
        for token, label in enumerate(data["labels"][row].tolist()):
            if label != IGNORE:
                kind, ids = ("text", range(40)) if label < 40 else ("image", range(40, 64))
                add(wanted[kind], oracle.token_logits(x[token], ids), label - ids.start)
        pooled = np.tanh(oracle.linear(x[0], "itm_head.pooler"))
        add(wanted["itm"], oracle.linear(pooled, "itm_head.output"), int(data["itm_label"][row]))
    for name, (loss, correct, count) in wanted.items():
        # The loss is summed in float32.
        assert sums[name].loss.item() == pytest.approx(loss, rel=1e-5)
        assert (sums[name].correct.item(), sums[name].items) == (correct, count)
        assert count > 0


def add(total: list[float], logits: np.ndarray, target: int) -> None:
    total[0] += float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
    total[1] += int(logits.argmax() == target)
    total[2] += 1


def test_padding_changes_nothing() -> None:
    """More padding, other padding ids and other sequences beside it leave a sequence's features and gradients alone."""
    model = make().double()
    short, long = batch([5], pad_to=20), batch([5, 12], pad_to=32)
    for name in ("tokens", "segments", "positions", "labels"):
        long[name][0, :20] = short[name][0]
        long[name][0, 20:] = {"tokens": 7, "segments": PADDING, "positions": 0, "labels": IGNORE}[name]
    a, b = model(*inputs(short)), model(*inputs(long))
    assert torch.allclose(a[0], b[0, :20], atol=1e-12)
    gradients = []
    for features in (a[0], b[0, :20]):
        model.zero_grad()
        features.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-9) for name in gradients[0])


def test_every_parameter_gets_a_gradient() -> None:
    model, data = make(dataclasses.replace(SMALL, qk_norm=True)), batch([5, 9, 1], pad_to=28)
    sum(each.loss for each in losses(model, data).values()).backward()  # type: ignore[union-attr]
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_modality_without_masked_tokens_has_loss_zero_and_no_nan() -> None:
    model, data = make(), batch([5, 9], pad_to=28)
    sums = losses(model, data | {"labels": torch.where(data["labels"] < 40, IGNORE, data["labels"])})
    assert (sums["text"].loss.item(), sums["text"].items, sums["text"].correct.item()) == (0, 0, 0)
    (sums["text"].loss + sums["image"].loss).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_works_in_training_only() -> None:
    model, data = make(dataclasses.replace(SMALL, hidden_dropout=0.3, attention_dropout=0.3)), batch([5], pad_to=20)
    assert torch.equal(model(*inputs(data)), model(*inputs(data)))
    model.train()
    assert not torch.equal(model(*inputs(data)), model(*inputs(data)))


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    decayed = {
        p.name.split(".", 2)[-1] if p.layer is not None else p.name for p in parameters(GPTFace(SMALL, VOCABULARY)) if p.decay
    }
    layer = {"qkv.weight", "out_proj.weight", "mlp_in.weight", "mlp_out.weight"}
    assert decayed == layer | {"token_head.dense.weight", "itm_head.pooler.weight", "itm_head.output.weight"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 100, "heads": 12}, "nearest is 10 heads"),
        ({"layers": 0}, "model.layers must be at least 1"),
        ({"activation": "relu"}, "one of gelu, swiglu, got 'relu'"),
        ({"hidden_dropout": 1.0}, "below 1"),
    ],
)
def test_impossible_models_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelOptions(**wrong)  # type: ignore[arg-type]
