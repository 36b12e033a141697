"""A stage's output words against the plain way on one rank; several ranks are proven by the layouts (tests/engine)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptface_dist.parallel import vocab_parallel
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.vocab_parallel import TiedGradient, VocabParallelHead, VocabRange
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=11, image_codes=6, text_sha256="a" * 64, image_sha256="b" * 64)
HIDDEN = 8


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank and no process groups: a collective would raise."""
    monkeypatch.setattr(vocab_parallel.groups, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vocab_parallel, "copy_to_tensor_model_parallel_region", lambda x: x)


def words(dtype: torch.dtype) -> VocabParallelHead:
    generator = torch.Generator().manual_seed(0)
    made = VocabParallelHead(
        VocabRange(VOCABULARY, Layout()),
        nn.Parameter(torch.randn(VOCABULARY.size, HIDDEN, generator=generator).to(dtype)),
    )
    made.bias.data = torch.randn(VOCABULARY.size, generator=generator).to(dtype)
    made.tied = TiedGradient(made.weight.shape, torch.device("cpu"))
    return made


def features(rows: int, ids: range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    return made.requires_grad_(), torch.randint(ids.start, ids.stop, (rows,), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.usefixtures("alone")
def test_losses_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    head, scales = words(dtype), (0.25, 3.0)
    weight, bias = (x.detach().float().requires_grad_() for x in (head.weight, head.bias))
    for ids, scale in zip((VOCABULARY.text_range, VOCABULARY.image_range), scales, strict=True):
        x, labels = features(rows, ids, dtype)
        loss, correct = head(x, labels, ids)
        assert loss.dtype == torch.float32
        (loss * scale).backward()
        whole = x.detach().float().requires_grad_()
        logits = F.linear(whole, weight[ids.start : ids.stop], bias[ids.start : ids.stop])
        wanted = F.cross_entropy(logits, labels - ids.start, reduction="sum")
        (wanted * scale).backward()
        torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
        assert correct == (logits.argmax(1) == labels - ids.start).sum()
        assert x.grad is not None
        assert whole.grad is not None
        assert (x.grad.float() - whole.grad).norm() <= tolerance * whole.grad.norm()
    assert head.tied is not None
    assert weight.grad is not None
    assert head.tied.sum.dtype == torch.float32
    assert (head.tied.sum - weight.grad).norm() <= tolerance * weight.grad.norm()
    assert head.weight.grad is None, "the tied gradient is handed over at the end of the step"
    assert head.bias.grad is not None
    assert bias.grad is not None
    assert (head.bias.grad.float() - bias.grad).norm() <= tolerance * bias.grad.norm()


@pytest.mark.usefixtures("alone")
def test_evaluation_gives_the_same_loss_and_keeps_no_gradient() -> None:
    head, ids = words(torch.float32), VOCABULARY.image_range
    x, labels = features(9, ids, torch.float32)
    with torch.no_grad():
        loss, correct = head(x, labels, ids)
        logits = head(x, None, ids)
    assert not loss.requires_grad
    torch.testing.assert_close(F.cross_entropy(logits, labels - ids.start, reduction="sum"), loss)
    trained, right = head(x, labels, ids)
    assert trained == loss
    assert right == correct
