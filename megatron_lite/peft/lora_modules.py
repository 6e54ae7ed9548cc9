"""The linears and the embedding of LoRA and DoRA, split over tensor-parallel ranks.

``W + s B A``, with A [r, in] and B [out, r] sharded like W: where W's rows are split, so are B's, and A is replicated;
where W's columns are split, so are A's, and B is replicated. ``low = x A^T`` [tokens, r] is appended as r columns to
the tensor that the linear gathers or reduces anyway. So an adapted linear adds only these all-reduces over tp: of the
gradients of replicated parameters under sequence parallelism, as for a norm; and, with DoRA on a row-parallel linear,
of the squared norms of rows. The base's weight gets no gradient, and its input is not saved for one.

The model fuses q, k, v and gate, up; each has its own factors, which add to its own columns of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.distributed import comm, random
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec, attach, spec_of
from megatron_lite.families.family import linears
from megatron_lite.layers import matmul
from megatron_lite.layers.embedding import VocabParallelEmbedding
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear, product
from megatron_lite.layers.projection import VocabProduct, add_product
from megatron_lite.peft.lora import LoRAConfig


class LocalUpdate(NamedTuple):
    """A low-rank update of this rank's rows ``start`` to ``start + length`` of a weight. Its parameters are named
    ``lora_NAME_a``, ``_b`` and, with DoRA, ``_m``."""

    name: str
    start: int
    length: int
    r: int
    scale: float


class _Adapted(nn.Module):
    """What adapted linears and embeddings share. ``site``: the module's number in the seeds of dropout masks."""

    updates: list[LocalUpdate]
    weight: nn.Parameter
    matrix: Callable[[torch.dtype], Tensor]

    def adapt(self, name: str, updates: list[LocalUpdate], config: LoRAConfig) -> None:
        """Store the updates and the settings that they share."""
        self.updates, self.dropout, self.dora = updates, config.dropout, config.dora
        self.site = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")

    def add(self, name: str, spec: ShardSpec, size: int, init: float | str) -> None:
        """Register this rank's part of a trained parameter."""
        parameter = nn.Parameter(torch.empty(spec.local_shape(size)))
        self.register_parameter(name, attach(parameter, spec, init))

    def factors(self, kind: str, dtype: torch.dtype) -> list[Tensor]:
        """All ``a``, all ``b`` or all magnitudes (``m``), in order."""
        return [getattr(self, f"lora_{update.name}_{kind}").to(dtype) for update in self.updates]

    def a(self, dtype: torch.dtype) -> Tensor:
        """A of all updates, concatenated by rows: [sum of r, in]."""
        factors = self.factors("a", dtype)
        return factors[0] if len(factors) == 1 else torch.cat(factors)

    def b(self, dtype: torch.dtype) -> Tensor:
        """s B of all updates, block-diagonal: [rows, sum of r]."""
        scaled = [update.scale * b for update, b in zip(self.updates, self.factors("b", dtype), strict=True)]
        return scaled[0] if len(scaled[0]) == len(self.weight) else torch.block_diag(*self._filled(scaled, (0,)))

    def _filled(self, parts: Sequence[Tensor], shape: tuple[int, ...], value: float = 0.0) -> Iterator[Tensor]:
        """``parts``, one for the rows of each update, and between them blocks of ``value`` for rows without an update:
        [rows, *``shape``]."""
        row = 0
        for update, part in zip(self.updates, parts, strict=True):
            yield part.new_full((update.start - row, *shape), value)
            yield part
            row = update.start + update.length
        yield parts[0].new_full((len(self.weight) - row, *shape), value)

    def dropped(self, x: Tensor, seed: int | None, split: int) -> Tensor:
        """``x`` after dropout, for A. ``split``: the tp rank if ranks hold different parts of x, else 0."""
        if self.dropout == 0.0 or seed is None:
            return x
        return random.dropout(x, self.dropout, random.mix(seed, self.site, split))

    @torch.no_grad()
    def lengths(self, a: Tensor, b: Tensor) -> Tensor:
        """The squared L2 norms of this rank's part of the rows of W and of W + s B A, [2, rows], computed without B A
        or the sum in memory."""
        weight = self.matrix(a.dtype)
        plain = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(a.dtype, torch.float32)).square()
        return torch.stack((plain, plain + (b * (2 * matmul.linear(weight, a) + b @ (a @ a.t()))).sum(1)))

    def magnitude(self, lengths: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """The factor of each row's output, [rows]: the trained magnitude (relative to the norm of the frozen row) times
        the norm of the frozen row over that of the updated row, a constant in backward (Liu et al., section 4.3)."""
        ratio = (lengths[0] / lengths[1]).sqrt().to(trained[0].dtype)
        return ratio * torch.cat(list(self._filled(trained, (), 1.0)))


class _AddProduct(torch.autograd.Function):
    """``y += low b^T``, in place: one pass over y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(low, b)
        return y.add_(matmul.linear(low, b)) if matmul.through_float32(low, b) else y.addmm_(low, b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, b = ctx.saved_tensors
        return grad, matmul.linear(grad, b.t()), matmul.linear(low.t(), grad.t()).t()


def _plus(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """``y + low b^T``."""
    return y + product(low, b) if matmul.through_float32(low, b) else torch.addmm(y, low, b.t())


class UpdatedProduct(VocabProduct):
    """``hidden W^T + low b^T``, for the head."""

    def __init__(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor, low: Tensor, b: Tensor) -> None:
        super().__init__(wanted, hidden, weight)
        self.low, self.b = low.to(self.hidden.dtype), b.to(self.hidden.dtype)
        self.grad_low = self.grad_b = None
        if self.grad_hidden is not None:
            self.grad_low, self.grad_b = torch.zeros_like(self.low), torch.zeros_like(self.b, dtype=self.precise)

    def logits(self, tokens: slice | Tensor, into: Tensor) -> None:
        super().logits(tokens, into)
        into.addmm_(self.low[tokens], self.b.t())

    def accumulate(self, tokens: slice | Tensor, grad: Tensor) -> None:
        super().accumulate(tokens, grad)
        assert self.grad_low is not None and self.grad_b is not None
        self.grad_low[tokens] = matmul.linear(grad, self.b.t())
        add_product(self.grad_b, grad, self.low[tokens])

    def gradients(self) -> list[Tensor | None]:
        return [*super().gradients(), self.grad_low, self.grad_b]


class LoRAColumnLinear(_Adapted, ColumnParallelLinear):
    """A column-parallel linear with updates: A replicated, B split by rows like W.

    Forward: ``low`` of this rank's tokens joins x in its all-gather (``sp``). Backward: their gradients are
    reduce-scattered (``sp``) or all-reduced together.
    """

    product_kind = UpdatedProduct

    def __init__(self, base: ColumnParallelLinear, name: str, updates: list[LocalUpdate], config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.tp, self.sp, self.weight, self.bias = base.tp, base.sp, base.weight, base.bias
        self.adapt(name, updates, config)
        size, width = self.tp.size, self.weight.shape[1]
        for update in updates:
            rows = update.length * size
            self.add(f"lora_{update.name}_a", ShardSpec((update.r, width)), size, (3 * width) ** -0.5)
            self.add(f"lora_{update.name}_b", ShardSpec((rows, update.r), dim=0), size, 0.0)
            if self.dora:
                self.add(f"lora_{update.name}_m", ShardSpec((rows,), dim=0), size, "ones")

    def low(self, x: Tensor, seed: int | None) -> Tensor:
        """x A^T of this rank's tokens, [tokens (/ tp under sp), sum of r]."""
        a = self.a(x.dtype)
        split = self.tp.rank if self.sp else 0
        return product(self.dropped(x, seed, split), comm.copy_to(a, self.tp) if self.sp else a)

    def enter(self, x: Tensor, seed: int | None, tp: Axis) -> tuple[Tensor, ...]:
        x, low = comm.enter_joined(x, self.low(x, seed), tp, sp=self.sp)
        return x, self.weight, low, self.b(x.dtype)

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x) + self.low(x, None) @ self.b(x.dtype).t()

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        x, low = comm.enter_joined(x, self.low(x, seed), self.tp, sp=self.sp)
        b = self.b(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = comm.apply(_AddProduct, self.product(x, None if self.dora else bias), low, b)
        if not self.dora:
            return y
        y = y * self.magnitude(self.lengths(self.a(x.dtype), b), self.factors("m", x.dtype))
        return y if bias is None else y + bias


class LoRARowLinear(_Adapted, RowParallelLinear):
    """A row-parallel linear with an update: A split by columns like W, B replicated.

    This rank's partial ``low`` joins its partial y in the all-reduce or reduce-scatter (``sp``), and their gradients
    join in one all-gather (``sp``).
    """

    def __init__(self, base: RowParallelLinear, name: str, updates: list[LocalUpdate], config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.tp, self.sp, self.weight, self.bias = base.tp, base.sp, base.weight, base.bias
        self.adapt(name, updates, config)
        (update,), (rows, width) = updates, spec_of(self.weight).shape
        self.add(f"lora_{update.name}_a", ShardSpec((update.r, width), dim=1), self.tp.size, (3 * width) ** -0.5)
        self.add(f"lora_{update.name}_b", ShardSpec((rows, update.r)), self.tp.size, 0.0)
        if self.dora:
            self.add(f"lora_{update.name}_m", ShardSpec((rows,)), self.tp.size, "ones")

    @torch._disable_dynamo  # as in comm.apply: a collective must stay outside of compiled code
    def lengths(self, a: Tensor, b: Tensor) -> Tensor:
        """The squared L2 norms of whole rows: all-reduce over tp."""
        return comm.all_reduce(super().lengths(a, b), self.tp)

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        a, b = self.a(x.dtype), self.b(x.dtype)
        low = product(self.dropped(x, seed, self.tp.rank), a)
        y = self.product(x, None)
        if self.tp.size > 1:
            joined = self.reduce(torch.cat((y, low), dim=1))
            y, low = joined[:, : y.shape[1]], joined[:, y.shape[1] :]
        y = _plus(y, low, self.replicated(b))
        if self.dora:
            (magnitude,) = self.factors("m", x.dtype)
            y = y * self.magnitude(self.lengths(a, b), [self.replicated(magnitude)])
        return y if self.bias is None else y + self.replicated(self.bias).to(x.dtype)


class LoRAEmbedding(_Adapted, VocabParallelEmbedding):
    """An embedding with an update: A [vocab, r] split by vocabulary like the table, B [hidden, r] replicated. Rows of A
    are looked up and reduced together with rows of the table."""

    def __init__(self, base: VocabParallelEmbedding, name: str, updates: list[LocalUpdate], config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.tp, self.sp, self.weight = base.tp, base.sp, base.weight
        self.adapt(name, updates, config)
        (update,), (rows, width) = updates, spec_of(self.weight).shape
        self.add(f"lora_{update.name}_a", ShardSpec((rows, update.r), dim=0), self.tp.size, (3 * width) ** -0.5)
        self.add(f"lora_{update.name}_b", ShardSpec((width, update.r)), self.tp.size, 0.0)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        (update,), (a,), (b,) = self.updates, self.factors("a", dtype), self.factors("b", dtype)
        found = torch.cat((self.look_up(tokens, self.weight, dtype), self.look_up(tokens, a, dtype)), dim=1)
        joined, width = self.reduce(found), b.shape[0]
        b = comm.copy_to(b, self.tp) if self.sp else b
        return _plus(joined[:, :width], joined[:, width:], update.scale * b)


def add_lora(model: Any, config: LoRAConfig) -> None:
    """Replace each linear that ``targets`` matches by an adapted one. Base parameters keep their names."""
    matched = config.matched(model.config)

    def adapt(parent: Any, own: str, name: str, parts: Sequence[str], kind: Any) -> None:
        """Adapt ``parent.own``, called ``name``, which holds the linears ``parts`` by rows."""
        linear = getattr(parent, own)
        spec, rows = spec_of(linear.weight), linear.weight.shape[0]
        lengths = [chunk // linear.tp.size for chunk in spec.chunks] if spec.chunks else [rows]
        starts = accumulate(lengths, initial=0)
        updates = [
            LocalUpdate(part.rpartition(".")[2], start, length, config.rank_of(part), config.scale_of(part))
            for part, start, length in zip(parts, starts, lengths, strict=False)
            if part in matched
        ]
        if updates:
            setattr(parent, own, kind(linear, name, updates, config))

    for block in model.blocks:
        at = f"blocks.{block.layer}"
        for linear in linears(model.config):
            parts = [f"{at}.{linear.half}.{part}" for part in linear.parts]
            kind = LoRAColumnLinear if linear.split == 0 else LoRARowLinear
            adapt(getattr(block, linear.half), linear.name.partition(".")[2], f"{at}.{linear.name}", parts, kind)
    if model.embedding is not None:
        adapt(model, "embedding", "embedding", ["embedding"], LoRAEmbedding)
    if model.head is not None:
        adapt(model, "head", "head", ["head"], LoRAColumnLinear)
