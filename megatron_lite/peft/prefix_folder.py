"""Prefixes in folders of the peft library: one tensor, [length, layers × (keys, values) × kv heads × head_dim].

A prefix that an MLP computes is written as the output of the MLP, as the library does.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.checkpoint.adapters.peft_folder import CONFIG, PeftSource, write_folder
from megatron_lite.checkpoint.source import Info, Source
from megatron_lite.config import ModelConfig
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError
from megatron_lite.peft.prefix import PrefixConfig

_NAME = "prompt_embeddings"


def _sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes of the model, by the keys of the library's config."""
    heads = model.num_kv_heads
    return {"num_layers": model.num_layers, "num_attention_heads": heads, "token_dim": heads * model.head_dim}


class PrefixSource(PeftSource):
    """Prefixes."""

    peft: PrefixConfig
    peft_type = "PREFIX_TUNING"
    known = (
        *("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"),
        *("prefix_projection", "encoder_hidden_size", "init_weights"),  # only used in training
    )

    def __init__(self, folder: Path, base: Source) -> None:
        super().__init__(folder, base)
        where, sizes = folder / CONFIG, _sizes(self.model)
        wanted = {**sizes, "num_transformer_submodules": 1}
        told = [f"{k}={self.config[k]!a}, not {n}" for k, n in wanted.items() if self.config.get(k) not in (None, n)]
        if told:
            raise CheckpointError(f"{where}: not for this model: {'; '.join(told)}")
        length = self.config.get("num_virtual_tokens")
        self.peft = self.section(method="prefix", length=length)
        if mistakes := self.peft.unfit(self.model):
            raise CheckpointError(f"{where}: {'; '.join(mistakes)}")
        dtype = self.check_stored(_NAME, (self.peft.length, 2 * self.model.num_layers * sizes["token_dim"]))
        shape = (sizes["num_attention_heads"], self.peft.length, sizes["token_dim"] // sizes["num_attention_heads"])
        self._starts = {
            f"model.blocks.{i}.attention.prefix.{kind}": (2 * i + j) * sizes["token_dim"]
            for i in range(self.model.num_layers)
            for j, kind in enumerate(("keys", "values"))
        }
        self.tensors |= dict.fromkeys(self._starts, Info(dtype, shape))
        self.check_all_used({_NAME})

    def read(self, name: str, tile: Tile) -> None:
        (heads, positions, dims), width = tile.place, self.tensors[name].shape[2]
        first = self._starts[name] + heads.start * width
        columns = slice(first, first + (heads.stop - heads.start) * width)
        flat = torch.empty((positions.stop - positions.start, columns.stop - first))
        self.fill(_NAME, (positions, columns), flat)
        tile.data.copy_(flat.view(len(flat), -1, width).transpose(0, 1)[:, :, dims])

    @staticmethod
    def write(adapter: Source, base: Source, folder: Path) -> dict[str, Tensor]:
        config, model = adapter.peft, adapter.model
        assert isinstance(config, PrefixConfig)
        model.traits.model_type(model)  # raises CheckpointError if Hugging Face has no such model

        def whole(name: str) -> Tensor:
            data = torch.empty(adapter.tensors[f"model.{name}"].shape)
            adapter.read(f"model.{name}", Tile(data, (0,) * data.dim()))
            return data

        made = []
        if config.reparameterize is not None:
            hidden = F.linear(whole("prefix.embedding"), whole("prefix.weight"), whole("prefix.bias")).tanh()
        for i in range(model.num_layers):
            at = f"blocks.{i}.attention.prefix"
            if config.reparameterize is not None:
                made.append(F.linear(hidden, whole(f"{at}.weight"), whole(f"{at}.bias")))
            else:  # each [heads, length, head_dim]
                made += [whole(f"{at}.{kind}").transpose(0, 1).flatten(1) for kind in ("keys", "values")]
        written = {_NAME: torch.cat(made, dim=1)}
        tree = {"peft_type": PrefixSource.peft_type, "num_virtual_tokens": config.length, "prefix_projection": False}
        tree |= {**_sizes(model), "num_transformer_submodules": 1, "encoder_hidden_size": None}
        write_folder(folder, tree, written, base, adapter)
        return written
