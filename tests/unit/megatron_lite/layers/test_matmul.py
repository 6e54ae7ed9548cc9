"""The product of a linear layer, whoever makes it, in any strides."""

import pytest
import torch

from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers import matmul
from megatron_lite.layers.linear import ColumnParallelLinear

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


def test_float32_on_a_cpu_goes_to_onednn():
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has no MKL, or no oneDNN")
    layer = ColumnParallelLinear(INNER, OUTER, Axis("tp"), bias=True, sp=False, std=0.02)
    with torch.profiler.profile() as profile:
        layer(_numbers(ROWS, INNER).requires_grad_()).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 2  # forward and the input's gradient
    with torch.profiler.profile() as profile:
        layer.double()(_numbers(ROWS, INNER).double())
    assert "mkldnn::_linear_pointwise" not in {event.key for event in profile.key_averages()}


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
