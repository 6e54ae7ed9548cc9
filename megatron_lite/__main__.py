"""``python -m megatron_lite COMMAND``: train, generate, prove, config, ckpt. Also the console script ``mlite``."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_lite import cli
from megatron_lite.config import load_config
from megatron_lite.dist.env import read_rank
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.plan import make_plan, parse_side


def config(config: str, ranks: int | None = None, **overrides: str) -> None:
    """Check a config, and whether it can run on --ranks; print it, resolved, as JSON.

    CONFIG is a path or the name of a shipped config; any --section.key=value overrides it.
    """
    checked = load_config(config, overrides)
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks={ranks}: expected at least 1")
    if ranks is not None:
        make_plan(checked, ranks)
    print(json.dumps(checked.model_dump(mode="json")))


def train(config: str, **overrides: str) -> None:
    """Train as one rank of a run; a launcher (python -m launch, torchrun) starts one for each device.

    CONFIG is a path or the name of a shipped config; any --section.key=value overrides it.
    """
    checked, rank = load_config(config, overrides), read_rank()
    plan = make_plan(checked, rank.size)
    from megatron_lite.train import train as run

    run(checked, plan, rank)


def generate(
    checkpoint: str,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Continue a prompt with a checkpoint's model.

    Temperature 0 is greedy. Under a launcher the model is split over its ranks, with the same tokens.
    """
    from megatron_lite.generate import Sampling, generate_text

    text = generate_text(Path(checkpoint), prompt, Sampling(max_new_tokens, temperature, top_k, top_p, seed))
    if text is not None:
        print(text)


def prove(
    config: str,
    a: str = "tp=1",
    b: str = "tp=2",
    steps: int = 3,
    dtype: str = "float64",
    tolerance: float | None = None,
    timeout: float = 600.0,
    **overrides: str,
) -> None:
    """Train the same steps under two layouts and compare losses, gradients and weights.

    --a and --b take keys of parallel, dp, accumulation and compile, as in 'tp=2,sp=true,dp=2'. Exit 1: they differ.
    """
    if steps < 1:
        raise ConfigError(f"--steps={steps}: expected at least 1")
    checked = load_config(config, overrides)
    sides = [parse_side(text, checked, dtype) for text in (a, b)]
    from megatron_lite.prove import prove as run

    run(sides, steps, tolerance, timeout=timeout)


def ckpt(action: str, path: str) -> None:
    """Look into a checkpoint: ckpt inspect PATH, ckpt verify PATH. PATH is a checkpoint, or a run: its latest one."""
    actions = ("inspect", "verify")
    if action not in actions:
        raise ConfigError(f"unknown action {action!r}{cli.nearest(action, actions)}; there are: {', '.join(actions)}")
    from megatron_lite.checkpoint import find
    from megatron_lite.checkpoint import inspect as look

    found = find(Path(path))
    if action == "inspect":
        look.inspect(found)
    else:
        print(look.verify(found))


COMMANDS: dict[str, cli.Command] = {
    "train": train,
    "generate": generate,
    "prove": prove,
    "ckpt": ckpt,
    "config": config,
}


def main() -> None:
    """The console script."""
    cli.main(COMMANDS, prog="megatron_lite")


if __name__ == "__main__":
    main()
