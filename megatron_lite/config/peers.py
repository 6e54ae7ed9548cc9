"""Names of our keys in other projects, used only for hints: Hugging Face's TrainingArguments and model configs, the
peft library, Megatron-LM, DeepSpeed, torchtitan, nanotron, LLaMA-Factory and axolotl.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from megatron_lite.config.tree import Config
from megatron_lite.peft import METHODS
from megatron_lite.section import Section

# Our key (with the equivalent value if theirs is a switch) → theirs.
_THEIRS = {
    # A run and its files
    "run": "job general",
    "run.name": "run_name exp_name experiment_name wandb_name wandb_exp_name wandb_run_id",
    "run.dir": "output_dir dump_folder checkpoints_path save output_path work_dir logging_dir tensorboard_dir",
    "run.seed": "random_seed data_seed",
    "checkpoint": "checkpoints",
    "checkpoint.every": "save_steps save_interval checkpoint_interval interval save_every save_freq",
    "checkpoint.keep": "save_total_limit keep_latest_k num_checkpoints_to_keep",
    "checkpoint.keep_every": "save_retain_interval",
    "checkpoint.async": "async_save async_mode",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints resume_checkpoint_path load load_step",
    "init.from": (
        "model_name_or_path pretrained_model_name_or_path base_model base_model_name_or_path pretrained_checkpoint "
        "initial_load_path hf_model_path finetune"
    ),
    "init.adapter": "adapter_name_or_path lora_model_dir adapter_path",
    # The model
    "model.preset": "flavor model_size",
    "model.family": "model_type architectures",
    "model.vocab_multiple": "make_vocab_size_divisible_by pad_to_multiple_of",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.hidden_size": "hidden_dim dim n_embd d_model embed_dim embedding_dim",
    "model.num_layers": "num_hidden_layers n_layers n_layer num_layer layers depth",
    "model.num_heads": "num_attention_heads n_heads n_head num_query_heads",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups n_kv_head group_query_attention",
    "model.head_dim": "kv_channels head_size",
    "model.ffn_size": "intermediate_size ffn_hidden_size ffn_dim n_inner mlp_dim",
    "model.max_seq_len": "max_position_embeddings n_positions n_ctx max_sequence_length",
    "model.norm_eps": (
        "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon rms_norm_epsilon"
    ),
    "model.rope_theta": "rotary_base rope_base rotary_emb_base",
    "model.rope_scaling": "rope_parameters use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor",
    "model.bias": "mlp_bias add_bias_linear",
    "model.bias=false": "disable_bias_linear",
    "model.qkv_bias": "attention_bias add_qkv_bias",
    "model.qk_norm": "qk_layernorm use_qk_norm",
    "model.tie_embeddings": "tie_word_embeddings share_embeddings_and_output_weights enable_weight_tying",
    "model.tie_embeddings=false": "untie_embeddings_and_output_weights",
    "model.dropout": "hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop dropout_rate",
    "model.attention_dropout": "attn_pdrop attention_probs_dropout_prob attn_dropout",
    "model.init_std": "initializer_range init_method_std",
    # The data
    "data.tokenizer": (
        "tokenizer_path tokenizer_model tokenizer_name tokenizer_name_or_path tokenizer_type hf_assets_path vocab_file"
    ),
    "data.train": (
        "train_data_path data_path dataset datasets train_file dataset_path dataset_name dataset_dir train_dataset "
        "dataset_folder hf_dataset_or_datasets"
    ),
    "data.validation": "eval_dataset val_data_path valid_data_path validation_file test_datasets val_dataset",
    "data.split": "val_size val_set_size validation_split_percentage val_split",
    "data.seq_len": (
        "seq_length sequence_length sequence_len cutoff_len max_seq_length max_length block_size model_max_length "
        "context_length"
    ),
    "data.document_mask": "reset_attention_mask reset_position_ids neat_packing eod_mask_loss",
    "data.packing=conversations": "sample_packing",
    "data.prefetch": (
        "dataloader_num_workers num_workers dataloader_prefetch_factor num_loading_workers preprocessing_num_workers"
    ),
    # The optimizer
    "optim": "optimizer_factory",
    "optim.name": "optimizer_type optimizer_name",
    "optim.lr": "learning_rate max_lr base_lr peak_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.momentum": "muon_momentum sgd_momentum",
    "optim.weight_decay": "wd adam_weight_decay start_weight_decay end_weight_decay",
    "optim.clip": "max_grad_norm clip_grad gradient_clipping grad_clip max_norm gradient_clip_val clip_grad_norm",
    "optim.schedule": (
        "lr_scheduler_type lr_decay_style decay_type lr_schedule lr_scheduler learning_rate_scheduler scheduler"
    ),
    "optim.warmup_steps": "lr_warmup_steps lr_warmup_iters num_warmup_steps warmup_iters warmup_num_steps",
    "optim.decay_steps": "lr_wsd_decay_iters lr_decay_steps num_decay_steps",
    # How much, how long, how often
    "train": "training tokens training_arguments",
    "train.steps": (
        "max_steps train_iters train_steps num_train_steps max_iters total_steps training_steps total_num_steps"
    ),
    "train.global_batch_size": "train_batch_size total_batch_size",
    "train.micro_batch_size": (
        "per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size per_device_batch_size"
    ),
    "train.precision=bfloat16": "bf16 use_bf16",
    "train.precision": "dtype torch_dtype mixed_precision mixed_precision_param params_dtype compute_dtype",
    "train.compile": "torch_compile enable_compile",
    "train.log_every": "logging_steps log_interval log_freq iteration_step_info_interval steps_per_print",
    "train.eval_every": "eval_interval val_check_interval eval_freq evals_per_epoch eval_strategy evaluation_strategy",
    "train.eval_steps": "eval_iters limit_val_batches limit_val_steps",
    "train.hang_timeout": "ddp_timeout distributed_timeout_minutes train_timeout_seconds init_timeout_seconds",
    "train.profile": "profiling profiler enable_profiling profile_step_start profile_step_end profiler_steps",
    # Parallelism
    "parallel": "parallelism distributed",
    "parallel.tp": (
        "tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree tp_size tensor_parallel autotp_size"
    ),
    "parallel.sp": "sequence_parallel enable_sequence_parallel tp_linear_async_communication",
    "parallel.engine": "zero_engine distributed_strategy",
    "parallel.zero": "zero_optimization zero_stage zero_optimization_stage data_parallel_sharding_strategy",
    "parallel.zero=3": "fsdp fsdp_config use_torch_fsdp2 use_megatron_fsdp fully_shard",
    "parallel.zero=2": "use_distributed_optimizer shard_grad_op",
    "parallel.dp_replicate": "data_parallel_replicate_degree dp_replicate_size num_distributed_optimizer_instances",
    "parallel.deepspeed": "deepspeed_config ds_config",
    "parallel.offload": "cpu_offload offload_optimizer offload_param optimizer_cpu_offload enable_cpu_offload",
    "parallel.offload_activations": "activation_offloading cpu_offloading activation_cpu_offload",
    "parallel.recompute": (
        "recompute_granularity activation_checkpoint recompute_layer recompute_method selective_ac_option"
    ),
    "parallel.recompute=selective": "recompute_activations",
    "parallel.recompute=full": "gradient_checkpointing activation_checkpointing",
    "parallel.bucket_mb": "ddp_bucket_size ddp_bucket_cap_mb reduce_bucket_size bucket_cap_mb",
    # Adapters
    "peft": "lora peft_config lora_config",
    "peft.method": "finetuning_type peft_type peft_method train_type",
    "peft.method=lora": "use_lora use_peft",
    "peft.r": "lora_rank lora_r lora_dim rank",
    "peft.alpha": "lora_alpha",
    "peft.dropout": "lora_dropout",
    "peft.targets": "lora_target target_modules lora_target_modules lora_target_linear apply_lora_to_mlp",
    "peft.ranks": "rank_pattern",
    "peft.alphas": "alpha_pattern",
    "peft.rslora": "use_rslora peft_use_rslora",
    "peft.dora": "use_dora peft_use_dora",
    "peft.length": "num_virtual_tokens prefix_length",
    "peft.base_dtype=nf4": "load_in_4bit qlora",
    "peft.base_dtype=int8": "load_in_8bit",
    "peft.base_dtype": "quantization_bit quantization_config bnb_4bit_quant_type",
}

_METHODS = " or ".join(", ".join(METHODS).rsplit(", ", 1))  # as in a sentence

# Their keys that have no equivalent here → what to do instead.
_OTHERWISE = {
    "gradient_accumulation_steps gradient_accumulation batch_accumulation_per_replica accumulate_grad_batches": (
        "it follows: train.global_batch_size ÷ (train.micro_batch_size × dp)"
    ),
    "data_parallel_size dp dp_size data_parallel_degree data_parallel_shard_degree num_data_parallel": (
        "it follows: ranks ÷ parallel.tp; parallel.zero says what is divided over them"
    ),
    "num_train_epochs num_epochs epochs max_epochs train_samples num_train_samples": (
        "give the length in train.steps: samples × epochs ÷ train.global_batch_size"
    ),
    "warmup_ratio lr_warmup_fraction warmup_samples lr_warmup_samples": "given in steps: optim.warmup_steps",
    "lr_decay_iters decay_ratio lr_decay_samples": (
        "a schedule ends with train.steps; optim.decay_steps is the length of WSD's decay"
    ),
    "min_lr lr_min min_learning_rate min_lr_factor min_decay_lr cosine_min_lr_ratio": (
        "given as a fraction of optim.lr: optim.min_lr_ratio"
    ),
    "eval_steps": "how often: train.eval_every; over how many global batches: train.eval_steps",
    "fp16 half float16 fp16_opt_level": "there is no float16; train.precision=bfloat16",
    "fp8 fp4 float8": "there is none; train.precision=bfloat16",
    "pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pp pp_size": (
        "there are no pipeline stages; parallel.tp and parallel.zero divide a model"
    ),
    "context_parallel_size context_parallel_degree cp cp_size ulysses_parallel_size sequence_parallel_size": (
        "sequences are split over tensor-parallel ranks only: parallel.tp with parallel.sp"
    ),
    "expert_model_parallel_size expert_parallel_degree num_experts num_moe_experts ep": "there are no experts",
    "flash_attn flash_attention use_flash_attn use_flash_attention attn_implementation attention_backend": (
        "torch chooses the attention kernel"
    ),
    "swiglu normalization position_embedding_type hidden_act activation_function": "it comes with model.family",
    "template chat_template prompt_template": "the tokenizer's is used; data_tools chat --template=FILE takes another",
    "train_on_inputs train_on_prompt mask_history": "data_tools chat --loss says which turns are trained on",
    "report_to use_wandb wandb_project logger": "every run writes metrics.jsonl and TensorBoard's files",
    "nproc_per_node num_gpus gpus_per_node num_processes devices": "launch run --nproc=N starts N ranks on each host",
    "distributed_backend ddp_backend backend": "it follows from the device",
    "num_nodes nnodes num_machines": "launch run --nodes=N takes N hosts",
    "optimizer": "the section is optim here, and the optimizer is optim.name",
    "adapter": f"a method is peft.method={_METHODS}; an adapter to start from is init.adapter",
    "batch_size": "per rank: train.micro_batch_size; per step, over all ranks: train.global_batch_size",
    "per_device_eval_batch_size eval_batch_size eval_micro_batch_size": "as in training: train.micro_batch_size",
}

# Hint about one of our values → other names for it.
_VALUES = {
    "is peft.dora=true with peft.method=lora here": "dora",
    "is peft.base_dtype=nf4 with peft.method=lora here": "qlora",
    "is nf4 here": "int4 4bit fp4",
    "is bfloat16 here": "bf16",
    "is float32 here": "fp32",
    "there is no float16; bfloat16 has its size": "fp16 half float16",
    "comes with init.from, as one of family llama": "mistral qwen2 qwen3",
}

_HINTS = {name: f"is {ours} here" for ours, theirs in _THEIRS.items() for name in theirs.split()} | {
    name: told for names, told in _OTHERWISE.items() for name in names.split()
}
_VALUE_HINTS = {name: f" ({told})" for told, names in _VALUES.items() for name in names.split()}


def meant(name: str) -> str:
    """A hint such as `` (is optim.lr here)`` if this is another project's name of a key, or a key of ours in another
    section; else an empty string."""
    name = name.lower().replace("-", "_")
    hint = "is a section here" if name in Config.model_fields else _HINTS.get(name)
    if hint is None and (places := _ours().get(name)):
        hint = f"is {' or '.join(places)} here"
    return f" ({hint})" if hint else ""


def meant_value(name: str) -> str:
    """A hint such as `` (is nf4 here)`` if this is another project's name of a value; else an empty string."""
    return _VALUE_HINTS.get(name.lower(), "")


@cache
def _ours() -> dict[str, list[str]]:
    """The dotted paths of all keys, by their last part."""
    found: dict[str, list[str]] = {}
    for path in dict.fromkeys(keys(Config)):
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def keys(section: type[Section], path: str = "") -> Iterator[str]:
    """The dotted keys of a section and of the sections in it, without the outermost sections themselves."""
    for name, field in section.model_fields.items():
        inner = f"{path}{field.alias or name}"
        if path:
            yield inner
        for kind in METHODS.values() if inner == "peft" else _sections(field.annotation):
            yield from keys(kind, f"{inner}.")


def _sections(annotation: Any) -> list[type[Section]]:
    """The section that a key holds, if it holds one, even an optional one; sections in a list do not count."""
    kinds = [annotation, *get_args(annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
