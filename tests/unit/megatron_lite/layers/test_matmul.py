"""The product of a linear layer, whoever makes it, in any strides."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul
from megatron_lite.layers.attention import Attention
from megatron_lite.layers.context import Context
from megatron_lite.layers.embedding import VocabParallelEmbedding
from megatron_lite.layers.linear import ColumnParallelLinear
from megatron_lite.layers.loss import linear_cross_entropy
from megatron_lite.layers.mask import Visible
from megatron_lite.peft.lora import LoRAConfig
from megatron_lite.peft.lora_modules import LocalUpdate, LoRAColumnLinear

ROWS, INNER, OUTER = 37, 80, 24


def _numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (_numbers(ROWS, INNER), _numbers(OUTER, INNER)),
        (_numbers(INNER, ROWS).t(), _numbers(INNER, OUTER).t()),
        (_numbers(2 * ROWS, 3 * INNER)[::2, INNER : 2 * INNER], _numbers(OUTER, 3 * INNER)[:, 1 : 1 + INNER]),
        (_numbers(0, INNER), _numbers(OUTER, INNER)),
        (_numbers(1, INNER), _numbers(1, INNER)),
    ],
    ids=["plain", "transposed", "cut", "no-rows", "one-row"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_product(dtype, x, weight, bias):
    x, weight = x.to(dtype), weight.to(dtype)
    added = _numbers(weight.shape[0]).to(dtype) if bias else None
    exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
    torch.testing.assert_close(matmul.linear(x, weight, added), exact.to(dtype))


@pytest.mark.parametrize(("rule", "other", "taken"), [(1.0, 1.2, "rule"), (1.3, 1.0, "rule"), (1.5, 1.0, "other")])
def test_a_kernel_has_to_win_by_a_margin(monkeypatch, rule, other, taken):
    clock = [0.0]
    monkeypatch.setattr(matmul.time, "thread_time", lambda: clock[0])

    def lasts(seconds):
        slow = iter([9 * seconds])  # the first time

        def run():
            clock[0] += next(slow, seconds)

        return run

    assert matmul._fastest({"rule": lasts(rule), "other": lasts(other)}) == taken


def test_measuring_leaves_random_numbers_and_threads_as_they_were():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        matmul.measure(dtype, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not matmul.chooses(torch.empty(0)), reason="this torch has no MKL, or no oneDNN")
def test_a_busy_machine_chooses_alike():
    def choices():
        matmul._product_kernel.cache_clear()
        return [
            matmul._product_kernel(torch.float32, turned, weight_turned)
            for turned, weight_turned in itertools.product((False, True), repeat=2)
        ]

    quiet = choices()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert [choices() for _ in range(5)] == [quiet] * 5
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _layers(dtype):
    """Output, loss and gradients of a LoRA'd linear, attention and the fused loss."""
    alone = Axis("tp")
    base = ColumnParallelLinear(INNER, 3 * 32, alone, bias=True, sp=False, std=0.02)
    torch.nn.init.normal_(base.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    torch.nn.init.zeros_(base.bias)
    layer = LoRAColumnLinear(base, "up", [LocalUpdate("up", 0, 3 * 32, 4, 2.0)], LoRAConfig(method="lora"))
    for parameter in (layer.lora_up_a, layer.lora_up_b):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    attention = Attention(
        32, 2, 2, 16, alone, layer=0, bias=False, qkv_bias=False, sp=False, std=0.02, out_std=0.02, dropout=0.0
    )
    x = _numbers(ROWS, INNER).to(dtype).requires_grad_()
    head = VocabParallelEmbedding(48, 32, alone, sp=False, std=0.02)
    head.weight.data = _numbers(48, 32)
    hidden = attention.core(layer(x), Context(visible=Visible(causal=True)))
    loss = linear_cross_entropy(hidden, head, torch.arange(ROWS), 48)
    loss.backward()
    return [hidden.detach(), loss.detach(), x.grad, head.weight.grad, layer.weight.grad, layer.lora_up_b.grad]


@pytest.mark.skipif(not matmul.chooses(torch.empty(0)), reason="this torch has no MKL, or no oneDNN")
def test_bfloat16_through_float32_is_as_good(monkeypatch):
    exact = _layers(torch.float64)
    monkeypatch.setattr(matmul, "_attention_format", lambda: "float32")
    monkeypatch.setattr(matmul, "_product_kernel", lambda dtype, *_: "float32" if dtype == torch.bfloat16 else "torch")
    multiplied = []
    original = matmul._through_float32
    monkeypatch.setitem(matmul._KERNELS, "float32", lambda *args: multiplied.append(1) or original(*args))
    for right, got in zip(exact, _layers(torch.bfloat16), strict=True):
        gap = (got.double() - right.double()).abs().max() / right.abs().max()
        assert gap < 0.2
    # linear: forward and two gradients, LoRA's A and B alike; the loss is in float32 as a whole
    assert len(multiplied) == 9


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_torch_and_a_frozen_weight_keeps_no_input(trained):
    layer = ColumnParallelLinear(INNER, OUTER, Axis("tp"), bias=True, sp=False, std=0.02)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        parameter.requires_grad_(trained)
    x, grad = _numbers(ROWS, INNER).requires_grad_(), _numbers(ROWS, OUTER)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert any(tensor is x for tensor in kept) == trained
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight)
    if trained:
        torch.testing.assert_close(layer.weight.grad, grad.t() @ x)
        torch.testing.assert_close(layer.bias.grad, grad.sum(0))
    else:
        assert layer.weight.grad is None
