"""``python -m megatron_lite COMMAND``: train, generate, prove, config, ckpt. Also the console script ``mlite``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from megatron_lite import cli
from megatron_lite.config import PACKED_BYTES, load_config
from megatron_lite.distributed.env import read_rank
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.inference.requests import Request, Sampling, read_requests
from megatron_lite.planning.memory import checkpoint_bytes
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.side import parse_side


def config(config: str, ranks: int | None = None, **overrides: str) -> None:
    """Check a config, and whether it can run on --ranks; print it, resolved, as JSON.

    --ranks adds the degrees of its mesh as "mesh", and the size of a checkpoint as "checkpoint_bytes".

    CONFIG is a path or the name of a shipped config; any --section.key=value overrides it.
    """
    checked = load_config(config, overrides)
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks={ranks}: expected at least 1")
    shown = checked.model_dump(mode="json")
    if ranks is not None:
        shown["mesh"] = make_plan(checked, ranks).degrees
        shown["checkpoint_bytes"] = checkpoint_bytes(checked)
    print(json.dumps(shown))


def train(config: str, **overrides: str) -> None:
    """Train as one rank of a run; a launcher (python -m launch, torchrun) starts one for each device.

    CONFIG is a path or the name of a shipped config; any --section.key=value overrides it.
    """
    checked, rank = load_config(config, overrides), read_rank()
    plan = make_plan(checked, rank.size)
    from megatron_lite.training.run import train as run

    run(checked, plan, rank)


def rank() -> None:
    """Print what this process's launcher says it is, as JSON: rank, size, host and where ranks meet."""
    print(json.dumps(asdict(read_rank())), flush=True)


def generate(
    checkpoint: str,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    adapters: str = "",
    adapter: str | None = None,
    requests: str | None = None,
    base: str | None = None,
    base_dtype: str | None = None,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
) -> None:
    """Continue a prompt with a checkpoint's model, or (--chat) answer it through the checkpoint's chat template.

    Temperature 0 is greedy. Under a launcher the model is split over its ranks and generates the same tokens. A text
    ends at an end token: the tokenizer's, those in the model's generation_config.json (to which training on
    conversations adds what their answers end with) and, in a chat, the template's; else after --max_new_tokens, or at
    the model's maximum length.

    A prompt gets the special tokens that its tokenizer adds (bos, for some also eos) unless --add_bos or --add_eos,
    true or false, say otherwise; chat templates write their own.

    An adapter's checkpoint names its base; --base gives its path if it was moved. --adapters=NAME=RUN,NAME=RUN loads
    adapters onto one base; --adapter names the one to use. --base_dtype=int8 or nf4 keeps the base's linears in memory
    as peft.base_dtype does in training.

    --requests=FILE has one request per line, {"prompt": TEXT} or {"messages": [{"role": …, "content": …}, …]} (a
    conversation, through the chat template), with optional keys adapter, max_new_tokens, temperature, top_k, top_p and
    seed, which replace the flags, and id, which is returned. A file with an invalid line is refused as a whole.
    Each request is answered by a line of JSON, in order: {"index", "line", "id", "adapter", "text", "num_tokens",
    "finish_reason"}. index counts requests from 0, line the file's lines from 1, text is the generated text,
    finish_reason "stop" (an end token) or "length". A request that cannot be answered, such as one too long, gets
    {"index", "line", "id", "error"}; the others go on, and the exit code is 3. Random draws depend only on --seed, the
    request's index and the position; a request with its own seed draws what --prompt draws with that --seed.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    mistakes = [f"--{mistake}" for mistake in sampling.mistakes()]
    if base_dtype is not None and base_dtype not in PACKED_BYTES:
        mistakes.append(f"--base_dtype={base_dtype}{cli.nearest(base_dtype, PACKED_BYTES)}: expected int8 or nf4")
    if requests and prompt:
        mistakes.append("--prompt: the prompts come from --requests; give only one of the two")
    parts = [part.partition("=") for part in adapters.split(",") if part]
    named = {name: Path(path) for name, _, path in parts}
    if len(named) < len(parts) or not all(name and path for name, _, path in parts):
        mistakes.append(f"--adapters={adapters}: expected NAME=RUN,NAME=RUN, each name once")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    asked = [Request(prompt, adapter)]
    if requests:
        read = read_requests(Path(requests), {*named, "default"})
        asked = [replace(request, adapter=request.adapter or adapter) for request in read]
    from megatron_lite.inference.generate import generate_text

    where = Path(base) if base else None
    found = generate_text(
        Path(checkpoint),
        asked,
        sampling,
        chat=chat,
        adapters=named,
        base=where,
        packing=base_dtype,
        add=(add_bos, add_eos),
    )
    lead, failed = read_rank().rank == 0, []
    for index, (request, answer) in enumerate(zip(asked, found, strict=True)):
        if answer.error is not None:
            failed.append(f"line {request.line}")
        if lead:
            print(answer.to_json(index, request) if requests else answer.prompt + answer.text, flush=True)
    if lead and named and adapter is None and not requests:
        choose = f"--adapter={'|'.join(named)} uses one"
        print(f"note: answered by {checkpoint} without an adapter; {choose}", file=sys.stderr)
    if failed:
        told = ", ".join(failed[:20]) + (" …" if len(failed) > 20 else "")
        raise DataError(f"{requests}: {len(failed)} of {len(asked)} requests could not be answered: {told}")


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
    from megatron_lite.proof.prove import prove as run

    run(sides, steps, tolerance, timeout=timeout)


def inspect(checkpoint: str) -> None:
    """Show names, shapes and sizes. CHECKPOINT: one of ours, a run (its latest), or a Hugging Face folder."""
    from megatron_lite import convert

    convert.inspect(Path(checkpoint))


def verify(checkpoint: str) -> None:
    """Check every byte of a checkpoint of ours against its digests."""
    from megatron_lite import convert

    convert.verify(Path(checkpoint))


def diff(a: str, b: str, tolerance: float = 0.0, trust: bool = False) -> None:
    """Compare two checkpoints in any formats, tensor by tensor. Exit 1: they differ by more than --tolerance.

    The tolerance is relative to a tensor's largest element. The optimizer is compared where both have it.
    """
    from megatron_lite import convert

    convert.diff(Path(a), Path(b), tolerance, trust=trust)


def reshard(source: str, destination: str, files: int = 1, max_ram: str = "256M", trust: bool = False) -> None:
    """Rewrite a checkpoint into another number of files, within --max_ram, whatever its size.

    It appears as DESTINATION/step_N. Training needs no such step: every checkpoint loads at every layout.
    """
    cap = cli.parse_bytes(max_ram, "max_ram", least=64 << 20)
    from megatron_lite import convert

    convert.reshard(Path(source), Path(destination), files, cap, trust=trust)


def import_hf(source: str, destination: str, files: int = 1, vocab_multiple: int = 128, strict: bool = False) -> None:
    """Turn a Hugging Face folder into a checkpoint of ours, DESTINATION/step_00000000, with its tokenizer.

    To train from a folder no import is needed: --init.from=FOLDER. Llama, Mistral, Qwen2, Qwen3 and GPT-2. What cannot
    be honoured is refused by name. Keys of config.json that are ignored are a note; with --strict, an error. Where
    transformers is installed and the model is small enough for it, its logits are compared before anything is written.
    """
    from megatron_lite import convert

    convert.import_hf(Path(source), Path(destination), files, vocab_multiple, strict=strict)


def import_megatron(source: str, destination: str, files: int = 1, vocab_size: int | None = None) -> None:
    """Turn a Megatron-LM GPT checkpoint (torch_dist, or mp_rank_XX files) into one of ours: the weights.

    --vocab_size: the tokenizer's true size; Megatron keeps the padded one. Nothing pickled in it is run.
    """
    from megatron_lite import convert

    convert.import_megatron(Path(source), Path(destination), files, vocab_size)


def import_deepspeed(source: str, destination: str, config: str, files: int = 1) -> None:
    """Turn a ZeRO checkpoint that DeepSpeed wrote into one of ours: float32 weights and Adam's moments.

    CONFIG: a Hugging Face folder or a run that describes the model. --init.from continues from the result, with
    --init.optimizer=true also with its optimizer state. Nothing pickled in it is run.
    """
    from megatron_lite import convert

    convert.import_deepspeed(Path(source), Path(destination), Path(config), files)


def export_hf(
    source: str, destination: str, dtype: str = "stored", max_shard_size: str = "5G", trust: bool = False
) -> None:
    """Write the weights of a checkpoint as a new Hugging Face folder, read it back and compare.

    --dtype: stored, float32, bfloat16 or float16. Where transformers is installed and the model is small enough for it,
    its logits are compared, too.
    """
    size = cli.parse_bytes(max_shard_size, "max_shard_size")
    from megatron_lite import convert

    convert.export_hf(Path(source), Path(destination), dtype, size, trust=trust)


def merge_adapter(
    adapter: str,
    destination: str,
    base: str | None = None,
    to: str = "ours",
    dtype: str = "stored",
    unmerge: bool = False,
    trust: bool = False,
) -> None:
    """Merge a LoRA or DoRA adapter (a checkpoint or a run) into its base, in float32, within bounded memory.

    --base: where the base is, if it was moved. --to: ours (DESTINATION/step_00000000) or hf, a Hugging Face folder of
    --dtype. Read back, and its logits compared. --unmerge takes the adapter out of a merged --base again.
    """
    from megatron_lite import convert

    where = Path(base) if base is not None else None
    convert.merge_adapter(Path(adapter), Path(destination), where, to, dtype, unmerge=unmerge, trust=trust)


def import_peft(source: str, destination: str, base: str, trust: bool = False) -> None:
    """Turn a LoRA, DoRA or prefix folder of the peft library into a checkpoint of ours, DESTINATION/step_00000000.

    BASE: the model it belongs to, a Hugging Face folder, a checkpoint or a run. Nothing pickled is read.
    """
    from megatron_lite import convert

    convert.import_peft(Path(source), Path(destination), Path(base), trust=trust)


def export_peft(adapter: str, destination: str, base: str | None = None, trust: bool = False) -> None:
    """Write an adapter (a checkpoint or a run; LoRA, DoRA, prefix) as a folder of the peft library's; it is read back.

    --base: where the base is, if it was moved.
    """
    from megatron_lite import convert

    where = Path(base) if base is not None else None
    convert.export_peft(Path(adapter), Path(destination), where, trust=trust)


def average(sources: str, destination: str, last: int = 0, trust: bool = False) -> None:
    """The mean of the weights of several checkpoints, as DESTINATION/step_N of the last one.

    SOURCES: paths with commas between them, or a run and --last=N for its N last checkpoints.
    """
    from megatron_lite import convert

    convert.average([Path(part) for part in sources.split(",")], Path(destination), last, trust=trust)


COMMANDS: cli.Commands = {
    "train": train,
    "generate": generate,
    "prove": prove,
    "config": config,
    "rank": rank,
    "ckpt": {
        "inspect": inspect,
        "verify": verify,
        "diff": diff,
        "reshard": reshard,
        "import_hf": import_hf,
        "import_megatron": import_megatron,
        "import_deepspeed": import_deepspeed,
        "export_hf": export_hf,
        "average": average,
        "merge_adapter": merge_adapter,
        "import_peft": import_peft,
        "export_peft": export_peft,
    },
}


def main() -> None:
    """The console script."""
    cli.main(COMMANDS, prog="megatron_lite")


if __name__ == "__main__":
    main()
