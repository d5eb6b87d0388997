"""Several training processes, as torchrun starts them; without torchrun, a group of one."""

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def init(device: torch.device) -> torch.device:
    """Join the group that torchrun describes in the environment; return this process's device.

    A plain `python train.py` is a group of one and makes no call into torch.distributed.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # pinned memory would take up the first GPU too
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Numbers of the CPU are summed on the CPU: nccl would make each step wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Process 0 may prepare data for hours, while the others wait; torch would give up in minutes.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return device


def cleanup() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; process 0 writes files and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module | None:
    """The model as torchrun's processes train it together; None for a single process."""
    if world_size() == 1:
        return None
    if device.type == "cuda":
        timm = sys.modules.get("timm")  # only its own function keeps the activations in its norms
        (timm.layers if timm else nn.SyncBatchNorm).convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    return nn.parallel.DistributedDataParallel(model)


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any = None) -> Any:
    """The value of process 0, on every process. The others wait for it here."""
    return all_gather(value)[0]


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite each tensor by that of process 0. All processes must call this together."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
