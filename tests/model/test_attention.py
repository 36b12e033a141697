"""Which attention runs, and that both compute the same."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from gptface_dist.errors import UserError
from gptface_dist.kernels.attention.options import Fp8Options
from gptface_dist.model import attention
from gptface_dist.model.attention import AttentionOptions, attend
from tests.kernels.inputs import attention_inputs, relative


def test_kernels_compute_the_same_but_for_rounding() -> None:
    q, k, v, dout = attention_inputs("normal", 2, 40, 2, 32)
    seen = (torch.arange(40) < torch.tensor([[40], [17]]))[:, None, None, :]
    rows = seen[:, 0, 0, :, None, None]
    found = {}
    for kernel in ("sdpa", "fp8", "auto"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, seen, AttentionOptions(kernel)) * rows
        found[kernel] = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for plain, fp8, chosen in zip(*(found[kernel] for kernel in ("sdpa", "fp8", "auto")), strict=True):
        assert torch.equal(plain, chosen)
        assert 0.01 < relative(fp8, plain) < 0.09


@pytest.mark.parametrize(
    ("options", "head_size", "dropout", "message"),
    [
        ({"kernel": "flash"}, 64, 0.0, "auto, sdpa, fp8, got 'flash'"),
        ({"fp8_from": 0}, 64, 0.0, "at least 1 or null, got 0"),
        ({"kernel": "fp8"}, 192, 0.0, "up to 128, the model of 192"),
        ({"kernel": "fp8"}, 64, 0.1, "attention_dropout to 0, got 0.1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, head_size: int, dropout: float, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        AttentionOptions(**options).check(head_size, dropout)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="fp8, mixed, bf16, got 'fp4'"):
        Fp8Options("fp4")


class OnGpu:
    """What the choice looks at of a tensor on a GPU."""

    is_cuda = True
    device = "cuda"

    def __init__(self, tokens: int, size: int = 64, dtype: torch.dtype = torch.bfloat16):
        self.shape, self.dtype = (2, tokens, 4, size), dtype


def test_auto_takes_fp8_from_the_crossover_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    def chosen(options: AttentionOptions, *form: object) -> bool:
        return options.in_fp8(OnGpu(*form))  # type: ignore[arg-type]

    measured = AttentionOptions(fp8_from=1024)
    assert chosen(measured, 1024)
    assert not chosen(measured, 1023)
    assert not chosen(measured, 2048, 32)
    assert not chosen(measured, 2048, 64, torch.float32)
    assert not chosen(AttentionOptions(), 8192)
    assert not chosen(AttentionOptions("sdpa", fp8_from=1), 8192)
    assert chosen(AttentionOptions("fp8"), 7, 32)
    assert not measured.in_fp8(torch.zeros(1, 2048, 1, 64, dtype=torch.bfloat16))
    capability = (10, 0)
    assert not chosen(measured, 2048)


@pytest.mark.parametrize("kernel", ["sdpa", "fp8"])
def test_no_mask_is_a_mask_of_everything(kernel: str) -> None:
    q, k, v, _ = attention_inputs("normal", 2, 40, 2, 32)
    everything = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    torch.testing.assert_close(
        attend(q, k, v, None, AttentionOptions(kernel)), attend(q, k, v, everything, AttentionOptions(kernel))
    )


def test_hopper_asks_cudnn_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half-precision tensors on a GPU of 9.0; elsewhere PyTorch chooses."""
    asked: list[tuple[list[SDPBackend], bool]] = []
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backends, set_priority: asked.append((backends, set_priority)))
    attention.sdpa_priority(OnGpu(16))  # type: ignore[arg-type]
    ((backends, in_order),) = asked
    assert backends[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert SDPBackend.MATH in backends, "something computes everything"
    assert in_order
    attention.sdpa_priority(OnGpu(16, dtype=torch.float32))  # type: ignore[arg-type]
    attention.sdpa_priority(torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16))
    capability = (8, 0)
    attention.sdpa_priority(OnGpu(16))  # type: ignore[arg-type]
    assert len(asked) == 1


def test_pytorch_computes_in_that_order() -> None:
    """The order is given to PyTorch in a form that it takes."""
    with attention.sdpa_kernel(list(attention.HOPPER_BACKENDS), set_priority=True):
        q, k, v, _ = attention_inputs("normal", 1, 8, 1, 32)
        found = attention.sdpa(q, k, v, None)
    torch.testing.assert_close(found, attention.sdpa(q, k, v, None))
