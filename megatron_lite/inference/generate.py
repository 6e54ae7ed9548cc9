"""Text from a checkpoint, on one rank or under tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_lite.distributed.env import read_rank
from megatron_lite.distributed.mesh import build_mesh, pick_device, process_group
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.inference.codec import Codec
from megatron_lite.inference.loading import open_models
from megatron_lite.inference.requests import Answer, Request, Sampling
from megatron_lite.inference.sampling import generate, longest_prompt, most_tokens, of_request


def generate_text(
    path: Path,
    requests: Sequence[Request],
    sampling: Sampling,
    dtype: torch.dtype | None = None,
    *,
    chat: bool = False,
    adapters: Mapping[str, Path] | None = None,
    base: Path | None = None,
    packing: str | None = None,
    add: tuple[bool | None, bool | None] = (None, None),
) -> Iterator[Answer]:
    """Load a checkpoint and adapters on it, with all ranks of the job as tp ranks, and answer each request. Collective:
    every rank gets the answers. A request from a file that cannot be answered is answered with its error.

    ``chat``: a prompt is a user's message, formatted with the checkpoint's chat template.
    ``packing``: keep the model's own linears in 8 or 4 bits. ``add``: see ``Codec``.
    Raises CheckpointError for a checkpoint that does not verify or has no tokenizer, ConfigError for invalid numbers,
    an unknown adapter, or a prompt that is too long.
    """
    sampling.check()
    rank = read_rank()
    device = pick_device(rank)
    with process_group(rank, device, timeout_seconds=600.0):
        mesh = build_mesh({"tp": rank.size}, device)
        assert mesh is not None
        with open_models(path, mesh, dtype, adapters or {}, base, packing) as (models, files, default):
            asked = [(request.adapter or default, chat or not isinstance(request.prompt, str)) for request in requests]
            found = {name: models[name] for name, _ in asked}
            size = models[None].config.vocab_size
            assert size
            codecs = {name: Codec(files[name], path, size, add) for name in found}
            stops = {(name, talk): codecs[name].answer_ends if talk else codecs[name].ends for name, talk in asked}
            for index, (request, (name, talk)) in enumerate(zip(requests, asked, strict=True)):
                model, codec, stop = found[name], codecs[name], stops[name, talk]
                try:
                    prompt = codec.read(request.prompt, chat=talk)
                    if len(prompt) > (limit := longest_prompt(model)):
                        raise ConfigError(f"the prompt has {len(prompt)} tokens; this model takes at most {limit}")
                except MegatronLiteError as error:
                    if request.line is None:
                        raise
                    yield Answer(error=str(error))
                    continue
                own = of_request(sampling, index, request.own)
                known = max([codec.tokenizer.vocab_size, *(token + 1 for token in stop)])
                produced = generate(model, prompt, own, stop, models.compute, known=known)
                ended = len(produced) < most_tokens(model, prompt, own)
                read, text = codec.write(prompt, produced, chat=talk)
                yield Answer(name, read, text, len(produced), "stop" if ended else "length")
