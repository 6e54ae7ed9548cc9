"""Matrix products and attention on a CPU, each kind by the kernel that is fastest there; elsewhere torch's own.

Which is fastest depends on the processor: without instructions for bfloat16 torch multiplies some layouts a hundred
times slower than float32, and for float32 oneDNN and MKL each win on some. So each kind is measured once, some tenths
of a second in all (``measure``). A kernel has to win by a clear margin against the one that is the rule, since kernels
round differently: two starts on a machine, and ranks on alike ones, have to come to the same.
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
_MARGIN = 1.4  # of a winner over the kernel that is the rule; true ratios met so far: below 1.16 or above 1.9
_MEASUREMENTS, _TURNS = 3, 10

Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch's compiler calls for a linear layer.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _through_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float())


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_KERNELS: dict[str, Kernel] = {"torch": _torch, "onednn": _onednn, "float32": _through_float32}


def chooses(x: Tensor) -> bool:
    """Whether ``linear`` may take another kernel than torch's. Not where a block is compiled: there the compiler
    chooses."""
    narrow = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    able = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return narrow and able and not torch.compiler.is_compiling()


def measure(dtype: torch.dtype, device: torch.device) -> None:
    """Choose for all kinds of products in this format, at start-up, when nothing else runs."""
    if chooses(torch.empty(0, dtype=dtype, device=device)):
        for turned, weight_turned in product((False, True), repeat=2):
            _product_kernel(dtype, turned, weight_turned)
        if dtype == torch.bfloat16:
            _attention_format()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rounded: bool = True) -> Tensor:
    """``x @ weight.T + bias``: x [rows, in], weight [out, in], either in any strides, weight and bias in x's format or
    float32. Unless ``rounded``, what was multiplied in float32 stays so. No gradient."""
    y = (_KERNELS[_chosen(x, weight)] if chooses(x) else _torch)(x, weight, bias)
    return y.to(x.dtype) if rounded else y


def factor(weight: Tensor, x: Tensor) -> Tensor:
    """A weight as ``linear`` takes it for x: in x's format, or as it is where the product is made in float32, which
    saves the conversions there and back."""
    return weight if through_float32(x, weight) else weight.to(x.dtype)


def through_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` makes this product of bfloat16 in float32, and rounds it."""
    return x.dtype == torch.bfloat16 and chooses(x) and _chosen(x, weight) == "float32"


def _chosen(x: Tensor, weight: Tensor) -> str:
    if x.dtype == torch.float32 and len(x) <= _FEW:
        return "onednn"  # reads the weight once, which is what such a product costs
    return _product_kernel(x.dtype, x.stride(-1) != 1, weight.stride(-1) != 1)


@cache
def _product_kernel(dtype: torch.dtype, turned: bool, weight_turned: bool) -> str:
    """The kernel for a kind of product: forward, of an input gradient (the weight is transposed), of a weight gradient
    (both are)."""
    x, weight = _sample(dtype, (128, 256), turned), _sample(dtype, (256, 256), weight_turned)
    if dtype == torch.bfloat16:
        rule, other = "torch", "float32"
    else:
        rule, other = ("torch", "onednn") if turned else ("onednn", "torch")
    return _fastest({name: partial(_KERNELS[name], x, weight, None) for name in (rule, other)})


def attends_in_float32(q: Tensor) -> bool:
    """Whether attention to bfloat16 is faster in float32: not for one query at a time, which would convert all keys."""
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
    """Numbers like any others, not drawn: the run's random state is not to move."""
    numbers = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)
    return numbers.t().contiguous().t() if turned else numbers


def _fastest(candidates: Mapping[str, Callable[[], object]]) -> str:
    """The first, which is the rule, or the second if it is faster by the margin in each of some measurements: by one
    thread's own clock, since what else runs on a machine makes several threads wait for each other."""
    rule, other = candidates
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return other if all(_ratio(*candidates.values()) > _MARGIN for _ in range(_MEASUREMENTS)) else rule
    finally:
        torch.set_num_threads(threads)


def _ratio(rule: Callable[[], object], other: Callable[[], object]) -> float:
    """How much longer the one takes than the other: the median over turns, in which a busy moment meets both."""
    ratios: list[float] = []
    for turn in range(_TURNS):
        start = time.thread_time()
        rule()
        between = time.thread_time()
        other()
        if turn:  # the first one prepares
            ratios.append((between - start) / (time.thread_time() - between))
            if not 0.25 < ratios[-1] < 4:
                break  # the slow one would take the most of a second
    return median(ratios)
