"""DeepSpeed ZeRO, stages 0 to 3, around local tensor-parallel shards: the only file that imports deepspeed.

DeepSpeed owns the flat partitions, their communication and the update. It gets this rank's ordinary tensors, an ``mpu``
that describes the data-parallel peers, and a config derived from ours. Norm and clipping are ours, as under every
engine, because DeepSpeed relies on attributes of replicated parameters that are easily forgotten.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor

from megatron_lite.config import Config, OptimConfig
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.distributed.shard import Piece, materialize
from megatron_lite.engines.engine import Engine
from megatron_lite.engines.optim import build_adamw
from megatron_lite.errors import ConfigError

# On a CPU, DeepSpeed would compile this extension at start-up on every rank. That takes minutes and a lock, which a
# killed run leaves locked. torch's own collectives give the same results.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.filterwarnings("ignore", message=".*(gather_into|scatter)_tensor. is dep", category=FutureWarning)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class ModelParallelUnit:
    """The process groups under Megatron's names, both older and newer ones."""

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.device_mesh is not None
        alone = mesh.device_mesh["pp"].get_group()  # a group of one rank
        for name, axis in (
            ("data_parallel", mesh.data),
            ("model_parallel", mesh.tp),
            ("tensor_model_parallel", mesh.tp),
        ):
            setattr(self, f"get_{name}_group", lambda group=axis.group or alone: group)
            setattr(self, f"get_{name}_rank", lambda axis=axis: axis.rank)
            setattr(self, f"get_{name}_world_size", lambda axis=axis: axis.size)


def deepspeed_config(config: Config, accumulation: int, dp: int, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for a run, with the keys of ``parallel.deepspeed`` on top."""
    parallel, stage = config.parallel, config.parallel.zero
    micro, bucket = config.train.micro_batch_size, 2 * int(parallel.bucket_mb * 2**20 / 8)
    moved = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[parallel.offload]
    offload = {f"offload_{what}": {"device": "cpu", "pin_memory": gpu} for what in moved}
    return _merge(
        {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro * accumulation * dp,
            "gradient_clipping": 0.0,
            "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 supports only mean
            "bf16": {
                "enabled": config.train.precision == "bfloat16" and stage > 0,
                "immediate_grad_update": stage == 1,  # else gradients exist in bfloat16, too
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": gpu,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "sub_group_size": group_elements(config),
                "use_multi_rank_bucket_allreduce": False,  # reduce to each part's owner: half the cost of an all-reduce
                "reduce_scatter": config.train.precision != "float64",
                **offload,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        },
        parallel.deepspeed,
    )


def group_elements(config: Config) -> int:
    """Size of a parameter group: DeepSpeed flattens the gradients of one group at a time into another copy."""
    return 2 * int(config.parallel.bucket_mb * 2**20)


class Fragment(NamedTuple):
    """The location of this rank's part of a parameter: ``length`` elements of flat master ``group`` beginning at
    ``offset``, which are the elements of the parameter beginning at ``start``."""

    group: int
    offset: int
    start: int
    length: int


class DeepSpeedZeRO(Engine):
    """ZeRO (Rajbhandari et al. 2020): over dp, stage 1 divides optimizer state and masters, 2 gradients, 3 weights.

    Gradients are summed, where DeepSpeed averages. With bfloat16, stages 1 to 3 hold bfloat16 weights for computing
    beside float32 masters; stage 0 holds only the masters, and layers cast them at each use.
    """

    def spread(self, config: Config) -> None:
        self.stage, dp = config.parallel.zero, self.mesh.data
        deepspeed.init_distributed(dist_init_required=False)
        accumulation = config.train.global_batch_size // (config.train.micro_batch_size * dp.size)
        settings = deepspeed_config(config, accumulation, dp.size, self.mesh.device.type == "cuda")
        unit, exact = ModelParallelUnit(self.mesh), config.train.precision == "float64"
        silence = contextlib.redirect_stdout(io.StringIO())  # DeepSpeed prints its memory use
        with silence, _masters_in_float64() if exact else contextlib.nullcontext():
            try:
                checked = DeepSpeedConfig(settings, unit)
            except Exception as error:  # of many types, all about the given config
                raise ConfigError(f"parallel.deepspeed: {' '.join(str(error).split())}") from None
            if exact:
                checked.communication_data_type = torch.float64
            if self.stage == 3:
                self._materialize_divided(settings, checked.bfloat16_config.enabled, unit)
            else:
                materialize(self.model, self.mesh.device)
            self.engine = (_Float64Engine if exact else _BucketedEngine)(
                args=None,
                model=self.model,
                optimizer=build_adamw(self.model, self.specs, config.optim, group_elements(config)),
                mpu=unit,
                dist_init_required=False,
                config=settings,
                config_class=checked,
            )
        self.forward = self.engine  # its forward prepares the backward
        self.zero: Any = self.engine.optimizer
        self.bf16 = isinstance(self.zero, BF16_Optimizer)  # the optimizer of stage 1 with bfloat16
        if self.stage > 0:
            self.fragments = {n: self._fragment(p) for n, p in self.model.named_parameters() if n in self.trained}

    def _materialize_divided(self, settings: dict[str, Any], bf16: bool, unit: ModelParallelUnit) -> None:
        """Allocate and divide one layer after another, so that the whole model is never in memory."""
        trained = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        dtype = torch.bfloat16 if bf16 else trained.dtype
        for module in self.model.modules():
            if not module._parameters:
                continue
            materialize(module, self.mesh.device)
            module.to(dtype)  # packed weights stay as they are
            Init(
                module,
                self.mesh.data.group,
                mem_efficient_linear=False,
                config_dict_or_path=settings,
                dtype=dtype,
                mpu=unit,
            )
        model: Any = self.model
        for parameter in (model.head or model.embedding).parameters():
            deepspeed.zero.register_external_parameter(model, parameter)

    def make_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        return self.zero.optimizer if self.stage > 0 else self.zero

    @property
    def masters(self) -> list[Tensor]:
        """The flat masters of which this rank holds all, one for each group of parameters."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.fp32_groups_flat_partition if self.bf16 else self.zero.single_partition_of_fp32_groups

    def _fragment(self, parameter: Any) -> Fragment | None:
        """The location of this rank's part of a parameter; None if it has none."""
        if self.stage == 3:
            group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.mesh.data.rank * length
            length = min(length, parameter.ds_numel - start)
            return Fragment(group, offset, start, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        inside, lies = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(mapping.param_group_index, lies.start, inside.start, inside.numel)

    def piece(self, name: str, tensor: Tensor) -> Piece:
        if self.stage == 0:
            return self.specs[name].piece(tensor, self.axis(name))
        if name not in self.trained:
            start = self.mesh.data.rank * self.parameters[name].ds_tensor.ds_numel if self.stage == 3 else 0  # type: ignore[attr-defined]
            return self.specs[name].piece(tensor, self.axis(name), start)
        fragment = self.fragments[name]
        return self.specs[name].piece(tensor, self.axis(name), fragment.start if fragment else 0)

    def _parts(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """This rank's part of every parameter in ``flats``, which have the layout of the masters."""
        return {
            name: flats[f.group].detach().narrow(0, f.offset, f.length) if f else flats[0].new_empty(0)
            for name, f in self.fragments.items()
        }

    def local_weights(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().local_weights()
        trained = self._parts(self.masters)
        return {n: trained[n] if n in trained else self._frozen_part(p) for n, p in self.parameters.items()}

    def _frozen_part(self, parameter: Any) -> Tensor:
        """This rank's part of a frozen parameter: all of it, or a partition at stage 3."""
        if self.stage < 3:
            return parameter.detach()
        part = parameter.ds_tensor
        return part.data[: max(0, min(part.ds_numel, parameter.ds_numel - self.mesh.data.rank * part.ds_numel))]

    def local_moments(self, moment: str) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().local_moments(moment)
        return self._parts([self.state(master)[moment] for master in self.masters])

    def local_gradients(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().local_gradients()
        found = {}
        for name, fragment in self.fragments.items():
            parameter: Any = self.parameters[name]
            held = self.masters[0].new_empty(0)
            if fragment and self.stage == 3:
                held = self.zero._get_fp32_grad_state_partition(parameter, True)[0].view(-1)[: fragment.length]
            elif fragment and self.bf16:
                held = parameter._hp_grad.view(-1).narrow(0, fragment.start, fragment.length)
            elif fragment and self.zero.cpu_offload:
                master: Any = self.masters[fragment.group]
                held = master.grad.narrow(0, fragment.offset, fragment.length)
            elif fragment:
                held = self.zero.averaged_gradients[fragment.group][parameter._index_in_param_group].view(-1)
                held = held[: fragment.length]
            found[name] = held
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.mesh.data.size if self.stage == 3 else loss, scale_wrt_gas=False)

    def finish_gradients(self) -> Tensor:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)  # DeepSpeed reduces and offloads on streams of its own
        return self.norm()

    def update(self) -> None:
        self.engine.step()

    def drop_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.zero._pre_step()
            self.zero.averaged_gradients = {}
        elif self.stage > 0 and not self.bf16:
            self.zero.micro_step_id = -1
            self.zero._release_preflattened_grad_buffers()
            self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
            self.zero.all_grad_tensors = dict.fromkeys(self.zero.all_grad_tensors)

    def publish(self) -> None:
        if self.stage == 3:
            for group in range(len(self.masters)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self.zero._partition_all_parameters()  # free the full copies that it keeps of small parameters
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        elif self.bf16:
            self.zero.update_lp_params()
        elif self.stage > 0:
            for parts, master in zip(self.zero.parallel_partitioned_bit16_groups, self.masters, strict=True):
                parts[self.mesh.data.rank].data.copy_(master.data)
            all_gather_dp_groups(
                groups_flat=self.zero.bit16_groups_flat,
                partitioned_param_groups=self.zero.parallel_partitioned_bit16_groups,
                dp_process_group=self.zero.real_dp_process_group,
                start_alignment_factor=self.zero.nccl_start_alignment_factor,
                allgather_bucket_size=self.zero.allgather_bucket_size,
            )


class _BucketedEngine(DeepSpeedEngine):
    """Reduces stage 0 gradients in buckets; DeepSpeed would flatten all at once, ignoring ``reduce_bucket_size``."""

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        super().allreduce_gradients(self.zero_reduce_bucket_size())


class _Float64Engine(_BucketedEngine):
    """For proofs in float64, which DeepSpeed does not support."""

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        dtype = torch.float64 if self.zero_optimization() else torch.float32  # stage 0 does not wrap the optimizer
        return dtype, dtype

    def buffered_allreduce_fallback(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(get_accelerator(), "supported_dtypes", return_value=[torch.float64]):
            super().buffered_allreduce_fallback(*args, **kwargs)


@contextlib.contextmanager
def _masters_in_float64() -> Iterator[None]:
    """Inside the ``with`` block DeepSpeed creates float64 masters; otherwise they are always float32."""
    original = ZeROOptimizer._configure_master_weights

    def in_float64(self: Any, *args: Any, **kwargs: Any) -> torch.dtype:
        original(self, *args, **kwargs)
        return torch.float64

    with mock.patch.object(ZeROOptimizer, "_configure_master_weights", in_float64):
        yield


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}
