"""Checkpoints that the frameworks themselves write: a small model of transformers's, a tiny Llama trained by DeepSpeed,
a tiny GPT saved by Megatron, an adapter of the peft library's."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.families.huggingface import MODEL_TYPES
from megatron_lite.inference.loading import load_model

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}


def owner_of(kind: str) -> tuple[Any, Any]:
    """Transformers' classes of a ``model_type``: its config, its model."""
    import transformers

    model = getattr(transformers, MODEL_TYPES[kind].architecture)
    return model.config_class, model


def small_config(kind: str) -> dict[str, Any]:
    """A config.json."""
    if kind == "gpt2":
        return {"model_type": kind, "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    sizes = {**SIZES, "vocab_size": 101, "max_position_embeddings": 64, "head_dim": 8}
    return {"model_type": kind, **sizes, **({"sliding_window": None} if kind == "mistral" else {})}


def random_folder(folder: Path, tree: dict[str, Any]) -> Any:
    """The model that transformers makes of this config.json, everything in it random, and its folder."""
    config, model = owner_of(tree["model_type"])
    theirs = model(config(**{key: value for key, value in tree.items() if key != "model_type"})).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.15)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(tree))
    theirs.config.return_dict = True  # what it returns is not what it computes
    return theirs


def assert_read_as_theirs(folder: Path, theirs: Any) -> None:
    """Logits of what we read from a folder are those of ``theirs``."""
    source = HuggingFaceSource(folder)
    tokens = torch.arange(min(24, source.model.max_seq_len)).unsqueeze(0) * 31 % (source.model.vocab_size or 1)
    with torch.no_grad():
        want = theirs(tokens).logits[:, -1]
        gap = (load_model(source)(tokens) - want).abs().max() / want.abs().max()
    assert gap < 1e-5, gap


def their_adapter(folder: Path, base: Path, settings: dict[str, Any]) -> Any:
    """An adapter that somebody trained, as the peft library's model, which is saved in ``folder``."""
    import peft
    from transformers import AutoModelForCausalLM

    kind = peft.PrefixTuningConfig if "num_virtual_tokens" in settings else peft.LoraConfig
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def train_with_deepspeed(
    rank: int, size: int, folder: str, stage: int, bf16: bool, frozen: Sequence[str] = (), tied: bool = False
) -> None:
    """Two steps of transformers' Llama under DeepSpeed's own engine, its checkpoint, and what it should hold, as
    ``want.pt``: the masters, gathered by DeepSpeed itself, and Adam's moments after the same steps without it.
    ``frozen``: parts of the names of what is not trained."""
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied)
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    plain = copy.deepcopy(model)
    if rank == 0:
        model.save_pretrained(Path(folder) / "model")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.0}},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        # Two groups, the second without weight decay, as people have them.
        trained = [p for p in model.parameters() if p.requires_grad]
        norms = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}
        groups = [{"params": [p for p in trained if p.ndim > 1]}, norms]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
        for _ in range(2):
            tokens = batch(rank)
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()
        engine.save_checkpoint(f"{folder}/ds")
        want = {
            name: safe_get_full_fp32_param(parameter).clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    if rank:
        return
    trained = [p for p in plain.parameters() if p.requires_grad]
    want |= {
        n: p.detach().to(torch.bfloat16 if bf16 else p.dtype) for n, p in plain.named_parameters() if n not in want
    }
    adam = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        adam.zero_grad()
        for other in range(size):
            (plain(input_ids=batch(other), labels=batch(other), use_cache=False).loss / size).backward()
        adam.step()
    for name, parameter in plain.named_parameters() if not frozen else ():
        want |= {f"{name}.{moment}": adam.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
    torch.save(want, f"{folder}/want.pt")


def batch(rank: int) -> torch.Tensor:
    """What a rank trains on."""
    return torch.arange(16).unsqueeze(0) * (rank + 3) % 99


LLAMA = {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "add_bias_linear": False}
GPT2 = {"normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute"}
GPT2 |= {"add_bias_linear": True, "bias_gelu_fusion": True}


def save_with_megatron(rank: int, size: int, folder: str, family: str) -> None:
    """Megatron-core's GPTModel, split over ``size`` tensor-parallel ranks, as torch_dist and as mp_rank_XX; and the
    logits it computes, as ``logits.pt``."""
    run_megatron(size)
    import torch.distributed as torch_dist
    from megatron.core import dist_checkpointing

    args, model = megatron_model(family)
    logits = megatron_logits(model)
    root, rank_folder = Path(folder), Path(folder) / "legacy" / "iter_0000007" / f"mp_rank_{rank:02d}"
    (root / "dist" / "iter_0000007").mkdir(parents=True, exist_ok=True)
    rank_folder.mkdir(parents=True)
    saved = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    torch.save(
        {**saved, "model": model.state_dict_for_save_checkpoint(), "rng_state": [{"seed": 1}]},
        rank_folder / "model_optim_rng.pt",
    )
    torch_dist.barrier()
    dist_checkpointing.save({**saved, **model.sharded_state_dict()}, str(root / "dist" / "iter_0000007"))
    if rank == 0:
        torch.save(logits[:, -1], root / "logits.pt")
        for kind in ("dist", "legacy"):
            (root / kind / "latest_checkpointed_iteration.txt").write_text("7\n")


def run_megatron(size: int) -> None:
    """Make Megatron-core run on this CPU, with ``size`` tensor-parallel ranks."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    from megatron.core import parallel_state
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    parallel_state.initialize_model_parallel(size, 1)
    fused_softmax.get_default_causal_mask = lambda n: torch.triu(torch.ones(n, n), 1).bool()
    get_cuda_rng_tracker().fork = contextlib.nullcontext


def megatron_model(
    family: str, changes: Mapping[str, Any] | None = None, model_changes: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, Any]:
    """The arguments of a tiny model of Megatron-core's, and the model, all of whose weights are random. ``changes``: to
    its TransformerConfig; ``model_changes``: to what else GPTModel takes."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    llama, rank = family == "llama", parallel_state.get_tensor_model_parallel_rank()
    args = argparse.Namespace(
        **(LLAMA if llama else GPT2),
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        group_query_attention=llama,
        num_query_groups=2 if llama else 1,
        ffn_hidden_size=48,
        kv_channels=8,
        max_position_embeddings=64,
        norm_epsilon=1e-5,
        rotary_base=10000,
        rotary_percent=1.0,
        padded_vocab_size=112,
        untie_embeddings_and_output_weights=llama,
        num_experts=None,
        bf16=False,
        output_dir=Path("/nowhere"),
    )
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2 if llama else 4,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "gated_linear_unit": llama,
        "activation_func": torch.nn.functional.silu if llama else gelu,
        "add_bias_linear": not llama,
        "normalization": args.normalization,
        "layernorm_epsilon": 1e-5,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "init_method_std": 0.2,
    }
    config = TransformerConfig(**{**settings, **(changes or {})})
    torch.manual_seed(1)
    others = {"share_embeddings_and_output_weights": not llama, **(model_changes or {})}
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization=args.normalization, qk_layernorm=config.qk_layernorm
        ),
        vocab_size=112,
        max_sequence_length=64,
        position_embedding_type=args.position_embedding_type,
        parallel_output=False,
        **others,
    ).eval()
    with torch.no_grad():  # nothing at zero or one; what every rank holds stays the same on all
        for name, parameter in model.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            generator = torch.Generator().manual_seed(sum(map(ord, name)) + (1000 * rank if split else 0))
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return args, model


def megatron_logits(model: Any) -> torch.Tensor:
    """What a model of Megatron-core's computes for 24 tokens."""
    tokens = torch.arange(24).unsqueeze(0) * 5 % 99
    with torch.no_grad():
        return model(tokens, torch.arange(24).unsqueeze(0), torch.triu(torch.ones(1, 1, 24, 24), 1).bool())


def gelu(x: torch.Tensor) -> torch.Tensor:
    """What Megatron's fused bias and gelu compute."""
    return torch.nn.functional.gelu(x, approximate="tanh")
