"""What a training step sends, and when: the collectives in the order they are started, between what is computed."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Which argument of a collective is the whole tensor; one that is not here raises.
WHOLE = {"allreduce": 0, "_allgather_base": 0, "_reduce_scatter_base": 1, "reduce_": 0, "broadcast": 0}


class Traffic(TorchDispatchMode):
    """``bytes`` that collectives move, an all-reduce counted as the reduce-scatter and all-gather it is; ``events``:
    each collective by name, "mm" for a matrix product, and what ``note`` was told, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.events = 0, list[str]()

    def note(self, event: str) -> None:
        self.events.append(event)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and not name.startswith("c10d.barrier"):
            kind = next(kind for kind in WHOLE if name.startswith(f"c10d.{kind}"))
            whole = args[WHOLE[kind]]
            for tensor in whole if isinstance(whole, (list, tuple)) else [whole]:
                self.bytes += (2 if kind == "allreduce" else 1) * tensor.numel() * tensor.element_size()
                if tensor.numel() > 2:  # counts, flags and norms are no traffic
                    self.note(kind)
        elif name.startswith("aten.mm"):
            self.note("mm")
        return func(*args, **(kwargs or {}))
