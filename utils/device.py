"""Where the numbers are crunched, and in which precision."""

import os
import platform
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from utils.errors import UserError, first_line

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """`auto` takes a CUDA GPU where there is one, then Apple's, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # the types differ by device and version
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from None
    return device


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of autocast. `auto` is what the device does fast: bf16 where it has units for it
    (fp16 on older GPUs), else fp32."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; fp32 means none. One code path for all three."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def suit_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model to a device and lay it out as the device likes it, in place.

    The convolutions' weights go channels last, the layout that convolutions are fast in, on CPUs
    and GPUs alike; activations follow the weights. Values do not change.
    """
    model.to(device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # it tries which algorithm is fastest
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            # In place PyTorch's bf16 kernels take three times as long on a CPU (RESULTS.md).
            module.inplace = not (device.type == "cpu" and dtype == torch.bfloat16)
    return model


def describe_device(device: torch.device) -> str:
    """The hardware in words, for logs and tables of measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
