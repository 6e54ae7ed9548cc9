"""Matrix products and attention on a CPU, each kind with the kernel that is fastest there; elsewhere torch's own.

Which is fastest depends on the processor: without bfloat16 instructions torch multiplies some layouts a hundred times
slower than in float32, and for float32 either oneDNN or MKL wins, depending on the layout. So each kind is measured
once, a few tenths of a second in all (``measure``). To replace the default kernel, another has to be faster by a clear
margin: kernels round differently, and all starts on one machine, and ranks on equal machines, must choose the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 16  # rows
_MARGIN = 1.4  # speedup over the default that a kernel needs; true ratios so far were below 1.16 or above 1.9
_MEASUREMENTS, _TURNS = 3, 10

Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operator that torch.compile uses for a linear layer.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _through_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float())


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_KERNELS: dict[str, Kernel] = {"torch": _torch, "onednn": _onednn, "float32": _through_float32}


def chooses(x: Tensor) -> bool:
    """Whether ``linear`` may use another kernel than torch's. Not in a compiled block, where the compiler chooses."""
    narrow = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    able = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return narrow and able and not torch.compiler.is_compiling()


def measure(dtype: torch.dtype, device: torch.device) -> None:
    """Choose the kernels for all kinds of products in ``dtype``; call it at start-up, when nothing else runs."""
    if chooses(torch.empty(0, dtype=dtype, device=device)):
        for turned, weight_turned in product((False, True), repeat=2):
            _product_kernel(dtype, turned, weight_turned)
        if dtype == torch.bfloat16:
            _attention_format()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rounded: bool = True) -> Tensor:
    """``x @ weight.T + bias``: x [rows, in], weight [out, in], both with any strides, weight and bias in x's dtype or
    float32. Unless ``rounded``, the result of a product in float32 stays in float32. No gradient."""
    y = (_KERNELS[_chosen(x, weight)] if chooses(x) else _torch)(x, weight, bias)
    return y.to(x.dtype) if rounded else y


def factor(weight: Tensor, x: Tensor) -> Tensor:
    """A weight as ``linear`` should get it for x: in x's dtype, or unchanged if the product is computed in float32,
    which saves two conversions."""
    return weight if through_float32(x, weight) else weight.to(x.dtype)


def through_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` computes this bfloat16 product in float32 and rounds it."""
    return x.dtype == torch.bfloat16 and chooses(x) and _chosen(x, weight) == "float32"


def _chosen(x: Tensor, weight: Tensor) -> str:
    if x.dtype == torch.float32 and len(x) <= _FEW:
        return "onednn"  # reads the weight once, which dominates the cost of such a product
    return _product_kernel(x.dtype, x.stride(-1) != 1, weight.stride(-1) != 1)


@cache
def _product_kernel(dtype: torch.dtype, turned: bool, weight_turned: bool) -> str:
    """The kernel for a kind of product: forward, input gradient (the weight is transposed) or weight gradient (both
    are)."""
    x, weight = _sample(dtype, (128, 256), turned), _sample(dtype, (256, 256), weight_turned)
    if dtype == torch.bfloat16:
        rule, other = "torch", "float32"
    else:
        rule, other = ("torch", "onednn") if turned else ("onednn", "torch")
    return _fastest({name: partial(_KERNELS[name], x, weight, None) for name in (rule, other)})


def attends_in_float32(q: Tensor) -> bool:
    """Whether bfloat16 attention is faster in float32: never for one query at a time, which would convert all keys."""
    return q.dtype == torch.bfloat16 and q.shape[2] > 1 and chooses(q) and _attention_format() == "float32"


@cache
def _attention_format() -> str:
    q = _sample(torch.bfloat16, (1, 2, 512, 64), False)

    def attend(dtype: torch.dtype) -> None:
        given = q.to(dtype).requires_grad_()
        with torch.enable_grad():
            F.scaled_dot_product_attention(given, given, given, is_causal=True).sum().backward()

    return _fastest({"bfloat16": partial(attend, torch.bfloat16), "float32": partial(attend, torch.float32)})


def _sample(dtype: torch.dtype, shape: tuple[int, ...], turned: bool) -> Tensor:
    """Test data that is not random, so that the run's random state stays the same."""
    numbers = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)
    return numbers.t().contiguous().t() if turned else numbers


def _fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """The first candidate, the default, or the second if it is faster by the margin in every measurement. Measured with
    one thread and its CPU time: under other load, several threads would wait for each other."""
    rule, other = candidates
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return other if all(_ratio(*candidates.values()) > _MARGIN for _ in range(_MEASUREMENTS)) else rule
    finally:
        torch.set_num_threads(threads)


def _ratio(rule: Callable[[], object], other: Callable[[], object]) -> float:
    """The time of ``rule`` divided by that of ``other``: the median over turns, so that a busy moment affects both."""
    ratios: list[float] = []
    for turn in range(_TURNS):
        start = time.thread_time()
        rule()
        between = time.thread_time()
        other()
        if turn:  # the first is a warm-up
            ratios.append((between - start) / (time.thread_time() - between))
            if not 0.25 < ratios[-1] < 4:
                break  # the slow kernel could take most of a second
    return median(ratios)
