"""engine=deepspeed: ZeRO 1, 2 or 3 over all dp x cp ranks, through accelerate, without a sequence-parallel mpu.

To DeepSpeed every rank is data parallel, so it averages over the world, as the step expects.
gradient_accumulation_steps stays 1, and this engine sets the boundary at the step's last micro-batch. Gradients are
communicated and accumulated in fp32. The engine checks what it obtained, because accelerate silently falls back to DDP
where CPU is asked for in the wrong way. Tested with deepspeed 0.19.8. Fragments replace its pickled checkpoints.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from longctx.errors import RunFailed, UserError, first_line
from longctx.train.fragments import MOMENTS, Fragment, FragmentReader
from longctx.train.parameters import decay_groups, full_shape, trainable

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, OptimConfig
    from longctx.distributed.ranks import Ranks
    from longctx.model import LossModel, LossOutput
    from longctx.model.placement import Place

# start in the parameter, elements, the flat fp32 partition that holds them, offset in that partition
Piece = tuple[int, int, torch.Tensor, int]


class ZeroEngine:
    """The ZeRO engine; see longctx.train.engine.Engine for its methods."""

    def __init__(self, config: EngineConfig, optim: OptimConfig, model: LossModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.zero_stage = model, ranks, config.zero
        self._named = trainable(model)
        self._shapes = {name: list(full_shape(parameter)) for name, parameter in self._named}
        dtype = self._named[0][1].dtype
        self.accelerator = _accelerator(config, optim, dtype, ranks)
        optimizer = _optimizer(config, optim, self._named, ranks)
        self._in_shares = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
        for buffer in model.buffers():  # DeepSpeed takes a model in shares to be on its device already
            buffer.data = buffer.data.to(ranks.device)
        self.engine: Any = self.accelerator.prepare(model, optimizer)[0]
        self.zero: Any = self.engine.optimizer
        self._check(config, dtype)

    def _check(self, config: EngineConfig, dtype: torch.dtype) -> None:
        kind = str(self.accelerator.distributed_type).rsplit(".", 1)[-1]
        shards = dist.get_world_size(self.zero.dp_process_group)
        found = (kind, dist.get_world_size(), self.engine.zero_optimization_stage(), shards)
        wanted = ("DEEPSPEED", self.ranks.world, config.zero, self.ranks.world)
        if found != wanted:
            raise RunFailed(
                f"engine=deepspeed obtained {found} instead of {wanted} (type, world, stage, shards); "
                "ACCELERATE_USE_CPU or an accelerate config in the environment may have changed it"
            )
        if self.engine.communication_data_type != torch.float32:
            raise RunFailed(f"gradients travel as {self.engine.communication_data_type}, not as float32")
        self.facts: dict[str, Any] = {
            "deepspeed": "accelerate " + kind, "ZeRO": config.zero, "world": self.ranks.world,
            "device": str(self.ranks.device), "backend": str(dist.get_backend()),
            "weights": str(dtype).removeprefix("torch."), "masters": "float32", "gradients": "float32",
            "offloaded": f"optimizer {config.offload_optimizer}, parameters {config.offload_parameters}",
            "loaded": "in shares" if self._in_shares else "whole",
            "trainable": sum(torch.Size(shape).numel() for shape in self._shapes.values()),
        }  # fmt: skip

    def forward(self, **batch: Any) -> LossOutput:
        return self.engine(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def grad_norm(self) -> torch.Tensor:
        """The norm over DeepSpeed's groups of parameters, whose norms span all ranks already."""
        found = [self.zero.scaled_global_norm()] if self.zero_stage < 3 else self.zero._get_norm_groups()
        norms = torch.stack([torch.as_tensor(norm, dtype=torch.float64, device=self.ranks.device) for norm in found])
        whole = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)
        return torch.where((norms < 0).any(), torch.nan, whole)  # DeepSpeed writes -1 for inf and NaN

    def step(self, lr: float, norm: float) -> None:
        """DeepSpeed clips by the norm that it forms itself."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def discard(self) -> None:
        """Forget the gradients of this step's micro-batches, as DeepSpeed does when a step overflows.

        A sum of micro-batches has three parts: the gradients on the parameters, DeepSpeed's own sums of them (by stage,
        and elsewhere if the optimizer is offloaded), and its count of micro-batches. Where the count decides whether a
        micro-batch replaces the sums or adds to them, it begins anew, too.
        """
        self.zero.zero_grad(set_to_none=True)
        if self.zero_stage == 3:
            self.zero._pre_step()  # the count
            self.zero._partition_all_parameters()  # what the backward pass has left gathered
            if self.zero.offload_optimizer:
                self.zero.reset_cpu_buffers()  # the norms of what lies on the host, which the next first one replaces
            else:
                self.zero.averaged_gradients = {}
        elif self.zero.cpu_offload:
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            self.zero.micro_step_id = INITIAL_MICRO_STEP_ID  # or the next one is added to the sum on the host
            self.zero._offload_accumulated_param_ids = set()
            self.zero.reset_cpu_buffers()
        else:
            for key in self.zero.averaged_gradients:
                self.zero.averaged_gradients[key] = None
                self.zero.all_grad_tensors[key] = None
        self.engine.micro_steps += 1  # as DeepSpeed's step does

    def shapes(self) -> dict[str, list[int]]:
        return dict(self._shapes)

    def _own_piece(self, parameter: nn.Parameter) -> Piece | None:
        """This rank's piece of a parameter; None where the rank holds no part of it."""
        if self.zero_stage == 3:
            return _parameter_shard(self.zero, parameter, self.ranks)
        return _optimizer_shard(self.zero, parameter)

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._named:
            piece = self._own_piece(parameter)
            if piece is None:
                continue
            start, numel, flat, offset = piece
            yield Fragment("weight", name, start, flat.detach().narrow(0, offset, numel))
            state = self.zero.optimizer.state.get(flat, {})
            for kind in MOMENTS:
                if kind in state:
                    yield Fragment(kind, name, start, state[kind].narrow(0, offset, numel))
            if start == 0:
                steps = float(state["step"]) if "step" in state else 0.0
                yield Fragment("steps", name, 0, torch.tensor([steps], dtype=torch.float64))

    def restore(self, reader: FragmentReader) -> None:
        for name, parameter in self._named:
            piece = self._own_piece(parameter)
            if piece is not None:
                self._restore_piece(reader, name, *piece)
            if self.zero_stage < 3:
                whole = reader.read("weight", name, 0, parameter.numel())
                parameter.data.copy_(whole.view_as(parameter))
            elif piece is not None:
                _, numel, flat, offset = piece
                cast(Any, parameter).ds_tensor.data.narrow(0, 0, numel).copy_(flat.detach().narrow(0, offset, numel))
        if self.zero_stage == 3:
            self.zero._partition_all_parameters()
            self.zero.invalidate_secondary_tensor()  # hpZ's copies, which hold the weights that were loaded
            self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Gather the small parameters that DeepSpeed keeps whole between steps.

        If they stayed partitioned, the next forward pass would register some of them with modules whose recorded trace
        lacks them, and stop with a tracing error.
        """
        small = self.zero.persistent_parameters
        if small:
            small[0].partition(small)
            small[0].all_gather(small)

    def _restore_piece(
        self, reader: FragmentReader, name: str, start: int, numel: int, flat: torch.Tensor, offset: int
    ) -> None:
        flat.data.narrow(0, offset, numel).copy_(reader.read("weight", name, start, numel))
        steps = float(reader.read("steps", name, 0, 1))
        if not steps:
            return
        state = self.zero.optimizer.state[flat]
        # The fused kernel reads the count where the weights are; DeepSpeed's CPU Adam counts in a plain number.
        fused = isinstance(self.zero.optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=flat.device) if fused else int(steps)
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat.data)
            state[kind].narrow(0, offset, numel).copy_(reader.read(kind, name, start, numel))

    def state_for_export(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed

        for name, parameter in self.model.named_parameters():
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    tensor = parameter.detach().clone() if self.ranks.first else parameter.detach()
                yield name, tensor
            else:
                yield name, parameter.detach()
        if self.zero_stage == 3:
            self._gather_persistent()

    def close(self) -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        self.engine.destroy()
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()


def zero3_placer(config: EngineConfig, optim: OptimConfig, dtype: torch.dtype, ranks: Ranks) -> Place:
    """A function that partitions a parameter as ZeRO-3 does and keeps this rank's share.

    It leaves out DeepSpeed's broadcast: every rank has read or drawn the same numbers, and a rank that fails to load
    then leaves no other rank waiting in a collective.
    """
    _prepare_deepspeed(ranks)
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed(dist_backend=_backend(ranks), auto_mpi_discovery=False)
    init: Any = deepspeed.zero.Init(
        module=nn.Module(),  # one without parameters: a module it is given also gets the linear that frees weights
        config_dict_or_path=_settings(config, optim, dtype, ranks),
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
    )

    def place(parameter: nn.Parameter) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(init.local_device)
            init._convert_to_deepspeed_param(parameter)
            cast(Any, parameter).partition()

    return place


def _backend(ranks: Ranks) -> str:
    return "gloo" if ranks.device.type == "cpu" else "nccl"


def _prepare_deepspeed(ranks: Ranks) -> None:
    """Set the environment variables that DeepSpeed reads, and quieten its log and the warnings about its calls."""
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's only switch
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    else:  # DeepSpeed and accelerate take LOCAL_RANK for a device's number, and several ranks may share a device
        os.environ["DS_ACCELERATOR"] = "cuda"
        os.environ["LOCAL_RANK"] = str(ranks.device.index)
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world)):
        os.environ.setdefault(name, str(value))
    import deepspeed

    # An all-reduce for inference that every CPU start would compile or load; training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls two collectives by names that torch 2.13 renames; nobody who trains can change that.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning, r"torch\.distributed\.c10d_logger")


def _accelerator(config: EngineConfig, optim: OptimConfig, dtype: torch.dtype, ranks: Ranks) -> Any:
    _prepare_deepspeed(ranks)
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plugin = DeepSpeedPlugin(hf_ds_config=_settings(config, optim, dtype, ranks), zero3_init_flag=False)
    accelerator = Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend=_backend(ranks))]
    )
    unset_hf_deepspeed_config()  # or every model made from here on (an export's) would be sharded too
    return accelerator


def _settings(config: EngineConfig, optim: OptimConfig, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's own config, without a value left to `auto`."""
    gpu = ranks.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero, "overlap_comm": gpu, "contiguous_gradients": True, "reduce_scatter": gpu,
        "round_robin_gradients": False, "zero_hpz_partition_size": config.hpz_partition_size,
    }  # fmt: skip
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.world, "gradient_clipping": optim.max_grad_norm, "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16}, "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "steps_per_print": 2**31,
    }  # fmt: skip


def _optimizer(config: EngineConfig, optim: OptimConfig, named: list[Any], ranks: Ranks) -> torch.optim.Optimizer:
    groups = decay_groups(named, optim.weight_decay)
    options: dict[str, Any] = {"lr": 0.0, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if config.offload_optimizer and ranks.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(groups, **options)  # its first call on a machine compiles it
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                "engine.offload_optimizer=true needs DeepSpeed's CPU Adam, which cannot be built here "
                f"({first_line(error)[:300]}); it takes a C++ compiler and the packages ninja and py-cpuinfo. Install "
                "them, or set engine.offload_optimizer=false (configs/engine)"
            ) from error
    return torch.optim.AdamW(groups, **options, fused=True)


def _optimizer_shard(zero: Any, parameter: torch.Tensor) -> Piece | None:
    """This rank's piece of a parameter under ZeRO 1 or 2, which partition the fp32 masters; None without one."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return (
        mapping.lp_fragment_address.start,
        mapping.lp_fragment_address.numel,
        flat,
        mapping.hp_fragment_address.start,
    )


def _parameter_shard(zero: Any, parameter: Any, ranks: Ranks) -> Piece | None:
    """This rank's piece of a parameter under ZeRO-3, which partitions the parameters themselves; None without one."""
    group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = ranks.rank * padded
    numel = min(padded, parameter.ds_numel - start)
    return (start, numel, zero.fp32_partitioned_groups_flat[group], offset) if numel > 0 else None
