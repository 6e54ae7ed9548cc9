"""Who may import whom, and where the environment and the rank may be read: held by reading the sources."""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "megatron_lite", "data_tools")
M = "megatron_lite."

# A package or module, and what of ours it may import besides itself, config and errors. The longest matching entry
# counts; what has no entry stands at the top and may import everything.
ALLOWED: dict[str, tuple[str, ...]] = {
    "launch": (),
    "launch.hosts": ("launch.process",),
    "launch.watch": ("launch.process", "launch.hosts"),
    "launch.launchers": ("launch.process", "launch.hosts", "launch.watch"),
    "launch.doctor": ("launch.process", "launch.hosts", "launch.watch", "launch.launchers"),
    "data_tools": (M + "cli", M + "data", M + "distributed.env"),
    M + "errors": (),
    M + "cli": (),
    M + "section": (),
    M + "config": (M + "cli", M + "tasks", M + "data.tokenizer", M + "section", M + "peft"),
    M + "families": (M + "cli",),
    M + "data": (M + "cli", M + "distributed.random"),
    M + "distributed": (),
    M + "layers": (M + "distributed",),
    M + "models": (M + "layers", M + "distributed"),
    M + "peft": (M + "layers", M + "distributed", M + "families", M + "checkpoint", M + "section"),
    M + "planning": (M + "cli",),
    M + "proof.side": (M + "cli", M + "planning"),
    M + "engines": (M + "distributed",),
    M + "checkpoint": (
        M + "data.ends",
        M + "data.tokenizer",
        M + "data.hf_tokenizer",
        M + "distributed",
        M + "training.faults",
        M + "layers.positions",
        M + "families",
        M + "peft",
    ),
    M + "training.report": (M + "distributed",),
    M + "training.faults": (M + "distributed",),
}
EVERYONE = (M + "config", M + "errors", M + "families")  # `launch` alone may not even import these
THIRD_PARTY: dict[str, set[str]] = {  # besides the standard library; where there is no entry, anything
    "launch": {"fire"},
    M + "errors": set(),
    M + "cli": {"fire"},
    M + "distributed.env": set(),
    M + "section": {"pydantic", "pydantic_core"},
    M + "config": {"pydantic", "yaml"},
    M + "families": set(),
}
NO_TORCH = (
    "launch",
    "data_tools",
    M + "section",
    M + "config",
    M + "families",
    M + "cli",
    M + "errors",
    M + "planning",
    M + "proof.side",
    M + "data.indexed",
    M + "distributed.env",
)


def sources() -> dict[str, ast.Module]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


SOURCES = sources()


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(name: str, nodes: Iterable[ast.AST] | None = None) -> Iterator[tuple[str, int]]:
    """Modules that ``name`` imports in these nodes, or anywhere, with the line; names of ours down to the module."""
    for node in ast.walk(SOURCES[name]) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in SOURCES else node.module or ""), node.lineno


def run_by_its_import(name: str) -> Iterator[ast.AST]:
    """What is neither within a function nor for type checkers alone."""
    nodes: list[ast.AST] = [SOURCES[name]]
    while nodes:
        node = nodes.pop()
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def rule(table: dict, name: str):
    """The entry of ``table`` for ``name``: the longest that it lies within."""
    matching = [entry for entry in table if within(name, entry)]
    return table[max(matching, key=len)] if matching else None


def own_package(name: str) -> str:
    matching = [entry for entry in ALLOWED if within(name, entry)]
    return max(matching, key=len) if matching else name


def for_each(names: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """One test for all of these modules: hundreds of tests would take longer than what they look at."""

    def decorate(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            for name in names:
                try:
                    check(name)
                except AssertionError as error:
                    error.add_note(f"in {name}")
                    raise

        return test

    return decorate


@for_each(SOURCES)
def test_nothing_imports_upward(name: str) -> None:
    allowed = rule(ALLOWED, name)
    if allowed is None or name.endswith(".__main__"):
        allowed = PACKAGES if not within(name, "launch") else ()
    everyone = () if within(name, "launch") else EVERYONE
    for target, line in imports(name):
        if target.split(".")[0] not in PACKAGES or within(target, own_package(name)) or target == "megatron_lite":
            continue
        assert any(within(target, entry) for entry in (*allowed, *everyone)), f"{name}:{line} imports {target}"


def test_no_module_needs_itself() -> None:
    needs: dict[str, set[str]] = {name: set() for name in SOURCES}
    for name in SOURCES:
        for target, _ in imports(name, run_by_its_import(name)):
            parts = target.split(".")
            whole = {".".join(parts[: i + 1]) for i in range(len(parts))}  # with the packages that it lies in
            needs[name] |= {part for part in whole & SOURCES.keys() if not within(name, part)}
    TopologicalSorter(needs).prepare()  # a CycleError tells the circle


@for_each([name for name in SOURCES if rule(THIRD_PARTY, name) is not None])
def test_third_party_packages_are_few(name: str) -> None:
    for target, line in imports(name):
        top = target.split(".")[0]
        assert top in sys.stdlib_module_names or top in PACKAGES or top in rule(THIRD_PARTY, name), (
            f"{name}:{line}: {top}"
        )


@for_each([name for name in SOURCES if any(within(name, entry) for entry in NO_TORCH)])
def test_no_torch_where_start_up_has_to_be_quick(name: str) -> None:
    assert not [target for target, _ in imports(name) if within(target, "torch")]


@for_each(SOURCES)
def test_the_environment_is_read_in_one_place(name: str) -> None:
    if within(name, "launch") or name == M + "distributed.env":
        return
    for node in ast.walk(SOURCES[name]):
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
        assert not (reads and getattr(node.value, "id", "") == "os"), f"{name}:{node.lineno} reads the environment"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"}.intersection(alias.name for alias in node.names), f"{name}:{node.lineno}"


@for_each([name for name in SOURCES if within(name, M + "layers") or within(name, M + "models")])
def test_layers_and_models_are_told_their_place(name: str) -> None:
    for node in ast.walk(SOURCES[name]):
        called = getattr(node, "attr", getattr(node, "id", ""))
        assert called not in ("get_rank", "get_world_size"), f"{name}:{node.lineno} asks for its rank"


@for_each([name for name in SOURCES if within(name, M + "models")])
def test_models_know_no_rank_group_or_collective(name: str) -> None:
    collectives = {node.name for node in SOURCES[M + "distributed.comm"].body if isinstance(node, ast.FunctionDef)}
    assert {"all_reduce", "all_gather", "copy_to"} <= collectives
    assert not [t for t, _ in imports(name) if within(t, "torch.distributed") or within(t, M + "distributed.comm")]
    for node in ast.walk(SOURCES[name]):
        word = getattr(node, "attr", getattr(node, "id", ""))
        assert word not in {"rank", "size", "group", *collectives}, f"{name}:{node.lineno}: {word}"


@for_each(SOURCES)
def test_no_file_of_odds_and_ends(name: str) -> None:
    assert name.split(".")[-1] not in ("utils", "helpers", "misc", "common")


@for_each(SOURCES)
def test_one_file_imports_deepspeed(name: str) -> None:
    assert name == M + "engines.deepspeed" or not [t for t, _ in imports(name) if within(t, "deepspeed")]


def test_no_pickle_and_no_shell() -> None:
    # The one refuses what would run, the other reads what its own children wrote.
    allowed = (M + "checkpoint.formats.pickles", M + "distributed.spawn")
    for name in SOURCES:
        pickles = [t for t, _ in imports(name) if t in ("pickle", "dill", "cloudpickle")]
        assert not pickles or name in allowed, name
        for node in ast.walk(SOURCES[name]):
            shell = isinstance(node, ast.keyword) and node.arg == "shell"
            assert not shell and getattr(node, "attr", "") not in ("system", "popen"), name
