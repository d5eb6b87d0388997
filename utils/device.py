"""Device and precision selection."""

import os
import platform
from contextlib import AbstractContextManager

import torch
from torch import nn

from utils.errors import UserError, first_line

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` takes a CUDA GPU if there is one, then Apple's, then the CPU.

    Raises:
        UserError: the device cannot be used here.
    """
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


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for `auto`, `fp32`, `bf16` or `fp16`.

    `auto` is what the device computes fast: bf16 where it has units for it (fp16 on older GPUs),
    else fp32.
    """
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; fp32 means none."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def prepare_model(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model to a device and lay it out for speed there, in place. Values do not change.

    The weights of convolutions go channels last, the layout in which convolutions are fast, on CPUs
    and GPUs alike; activations follow the weights.

    Raises:
        UserError: the model has an LSTM, which this CPU cannot run in `dtype`.
    """
    has_lstm = any(isinstance(module, nn.LSTM) for module in model.modules())
    if has_lstm and device.type == "cpu" and dtype != torch.float32:
        _require_lstm(dtype)
    model.to(device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # try which algorithm is fastest
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    for module in model.modules():
        if isinstance(module, nn.ReLU) and device.type == "cpu" and dtype == torch.bfloat16:
            module.inplace = False  # in place, PyTorch's bf16 kernels take three times as long
    return model


def _require_lstm(dtype: torch.dtype) -> None:
    """Try a tiny LSTM: on CPUs without AVX-512, oneDNN has none in bf16 and fp16."""
    try:
        with torch.random.fork_rng([]), torch.no_grad(), autocast(torch.device("cpu"), dtype):
            nn.LSTM(8, 8)(torch.zeros(1, 1, 8))
    except RuntimeError:
        raise UserError(
            f"this CPU cannot run the model's LSTM in {str(dtype).removeprefix('torch.')}: give "
            "--precision fp32"
        ) from None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor from the CPU to a device, without waiting for the work of a GPU.

    Only memory that the system may not move (pinned memory) is copied without waiting.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def describe_device(device: torch.device) -> str:
    """The name of the hardware, for logs and tables of measurements."""
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
