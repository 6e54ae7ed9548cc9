"""The fused projection and cross entropy: what torch computes in two steps, without ever holding the logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import loss as module
from megatron_lite.layers.loss import linear_cross_entropy
from megatron_lite.layers.projection import Projection, VocabProduct
from megatron_lite.peft.lora_modules import UpdatedProduct

TOKENS, HIDDEN, VOCAB, PADDED = 50, 3, 37, 40  # so narrow that chunks may be of 7 tokens


class Given(Projection):
    """A projection made of tensors that are there: a weight, and perhaps the factors of an update."""

    def __init__(self, weight, *factors):
        super().__init__()
        self.tp, self.sp, self.tensors = Axis("tp"), False, (weight, *factors)
        self.product_kind = UpdatedProduct if factors else VocabProduct

    def enter(self, x, seed, tp):
        return x, *self.tensors


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[[0, 7, 8]] = -100
    return hidden, weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("told", [False, True])
def test_equal_to_torch(monkeypatch, chunk, told):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    hidden, weight, targets = inputs()
    counted = (targets != -100).nonzero().squeeze(1) if told else None
    loss = linear_cross_entropy(hidden, Given(weight), targets, VOCAB, counted=counted)
    (3 * loss).backward()
    got = loss.detach(), hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    want = torch.nn.functional.cross_entropy((hidden @ weight.t())[:, :VOCAB], targets, reduction="sum")
    (3 * want).backward()
    for ours, theirs in zip(got, (want.detach(), hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not got[2][VOCAB:].any(), "the padding of the vocabulary gets a gradient"


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("told", [False, True])
def test_an_update_of_the_weight_is_equal_to_torch(monkeypatch, chunk, told):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    hidden, weight, targets = inputs()
    weight = weight.detach()
    low, factor = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (TOKENS, PADDED))
    counted = (targets != -100).nonzero().squeeze(1) if told else None
    linear_cross_entropy(hidden, Given(weight, low, factor), targets, VOCAB, counted=counted).backward()
    got = [tensor.grad.clone() for tensor in (hidden, low, factor)]
    hidden.grad = low.grad = factor.grad = None
    logits = (hidden @ weight.t() + low @ factor.t())[:, :VOCAB]
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for ours, theirs in zip(got, (hidden.grad, low.grad, factor.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_sums_in_float32():
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, Given(weight), targets, VOCAB)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    logits = hidden.double() @ weight.double().t()
    want = torch.nn.functional.cross_entropy(logits[:, :VOCAB], targets, reduction="sum")
    torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("counted", [None, torch.empty(0, dtype=torch.int64)])
def test_nothing_counted_is_zero_and_without_gradient(counted):
    hidden, weight, targets = inputs()
    none = torch.full_like(targets, -100)
    loss = linear_cross_entropy(hidden, Given(weight), none, VOCAB, counted=counted)
    loss.backward()
    assert (loss.item(), hidden.grad.abs().max().item(), weight.grad.abs().max().item()) == (0, 0, 0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


def test_only_counted_tokens_are_multiplied():
    hidden, weight, targets = inputs()
    targets[4:] = -100
    with Largest() as largest:
        counted = torch.tensor([1, 2, 3])
        linear_cross_entropy(hidden, Given(weight.detach()), targets, VOCAB, counted=counted).backward()
    assert largest.numel == TOKENS * HIDDEN


def test_the_whole_logits_never_exist(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    hidden, weight, targets = inputs()
    with Largest() as largest:
        linear_cross_entropy(hidden, Given(weight), targets, VOCAB).backward()
    assert largest.numel == 7 * PADDED <= 2 * TOKENS * HIDDEN < TOKENS * VOCAB
