"""The mesh, drawn for the log. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_lite.planning.plan import Plan


def picture(plan: Plan, limit: int = 8) -> str:
    """The ranks by their place on the mesh: a row for each data-parallel rank, a column for each tensor-parallel rank,
    at most ``limit`` of either."""

    def some(count: int) -> list[int | None]:
        return list(range(count)) if count <= limit else [*range(limit - 2), None, count - 1]

    def row(name: str, cells: Iterable[object]) -> str:
        return name.ljust(24) + "".join(str(cell).rjust(7) for cell in cells)

    columns = some(plan.tp)
    lines = [row("", ("…" if tp is None else f"tp {tp}" for tp in columns))]
    for dp in some(plan.dp):
        if dp is None:
            lines.append("…")
            continue
        copy, part = divmod(dp, plan.dp_shard)
        name = f"dp {dp}"
        if plan.dp_shard > 1:
            name += f" (part {part + 1}/{plan.dp_shard}" + (f", copy {copy + 1})" if plan.dp_shard < plan.dp else ")")
        lines.append(row(name, ("…" if tp is None else dp * plan.tp + tp for tp in columns)))
    return "\n".join(lines)
