"""What bounds a forward pass and a training step, arithmetic or memory; see benchmark_latency.py.

The roofline model: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance
Model for Multicore Architectures", Communications of the ACM, 2009. No program can be faster than
its floating-point operations divided by the peak of the machine, nor than the bytes that it moves
divided by the bandwidth of the memory. Both limits are measured here, by a large matrix product and
a large copy that take turns with the model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.timing import interleave, random_clips
from config import TrainConfig
from modeling.inference import prepare_for_inference
from models import build_model
from training.optim import param_groups
from utils.device import autocast, prepare_model

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, far more than any cache holds

EXPLAINED = 1 / 3
"""A limit that is a smaller part of the measured time than this bounds nothing."""


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call; a multiply-add counts as two.

    Counted are matrix products, convolutions, attention and LSTMs, in the backward pass too.
    Attention is computed step by step here, because PyTorch's counter misses the fused one of CPUs;
    so what a fused backward pass computes a second time is not counted. The counter knows no LSTM
    either: one of oneDNN or cuDNN is counted by its weights, others are matrix products. For the
    backward pass of a convolution with groups it counts as many times too much.
    """
    aten = torch.ops.aten
    lstm = {
        aten.mkldnn_rnn_layer: _lstm_flops,
        aten._cudnn_rnn: _lstm_flops,
        # The gradients of inputs and weights take a product each.
        aten.mkldnn_rnn_layer_backward: lambda *shapes, **_: 2 * _lstm_flops(*shapes),
        aten._cudnn_rnn_backward: lambda *shapes, **_: 2 * _lstm_flops(*shapes),
    }
    own = {**lstm, aten.convolution_backward: _convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=own)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


def _lstm_flops(inputs: Sequence[int], *shapes: Any, **_: Any) -> int:
    """Of shapes of the inputs, `(T, B, size)`, and of what follows until the first hidden state:
    the weights, `(4 * hidden, size)` and `(4 * hidden, hidden)`, alone or in a list."""
    if isinstance(shapes[0], list):  # of cuDNN: weights and biases of all layers and directions
        weights = [shape for shape in shapes[0] if len(shape) == 2]
    else:
        weights = shapes[:2]
    return 2 * inputs[0] * inputs[1] * sum(rows * columns for rows, columns in weights)


def _convolution_backward_flops(
    gradient: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *more: Any, **_: Any
) -> int:
    """The gradients of the inputs and of the weights take as much as the forward pass each."""
    *_, transposed, _, _, wanted = more
    forward = 2 * math.prod(inputs if transposed else gradient) * math.prod(weight[1:])
    return forward * (wanted[0] + wanted[1])


# What only reserves memory, or looks at the same memory in another shape.
_MOVES_NOTHING = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh"),
)
_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "bernoulli_")


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes that operators read and write: the traffic if nothing is fused or cached.

    Every operator reads each of its inputs once and writes each of its outputs once. An input that
    is changed in place is read and written; one that is broadcast counts once. Views and
    reservations of memory move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.total += _moved(function, args, kwargs, result)
        return result


def _moved(function: Any, args: Sequence, kwargs: dict, result: Any) -> int:
    name, schema = function.overloadpacket.__name__, function._schema
    if function.is_view or name in _MOVES_NOTHING:
        return 0
    total = 0
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and (argument.is_out or name in _OVERWRITES))
        if name.startswith("_fused_adam") and argument.name == "grads":
            writes = False  # only where fp16 scales them
        total += (reads + writes) * _nbytes(value)
    results = (result,) if len(schema.returns) == 1 else result or ()
    for returned, value in zip(schema.returns, results, strict=True):
        if returned.alias_info is None:  # otherwise it is an input
            total += _nbytes(value)
    return total


def _nbytes(value: Any) -> int:
    """Bytes of memory that the tensors of an argument cover."""
    return sum(
        x.element_size()
        * math.prod(n if s else min(n, 1) for n, s in zip(x.shape, x.stride(), strict=True))
        for x in tree_leaves(value)
        if isinstance(x, torch.Tensor)
    )


class TrainingStep:
    """The training step of train.py with its defaults, on one batch that is on the device."""

    def __init__(
        self, model: nn.Module, clips: torch.Tensor, config: TrainConfig, dtype: torch.dtype
    ) -> None:
        self.device = clips.device
        self.model = prepare_model(model, self.device, dtype).train()
        self.clips = clips
        self.labels = torch.zeros(len(clips), dtype=torch.long, device=self.device)
        self.dtype = dtype
        self.max_grad_norm = config.max_grad_norm
        groups = param_groups(model, 1e-4, config.weight_decay, config.layer_decay)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=fused)

    def __call__(self) -> None:
        self.forward().backward()
        self.update()

    def forward(self) -> torch.Tensor:
        """The loss."""
        with autocast(self.device, self.dtype):
            logits = self.model(self.clips)
        return F.cross_entropy(logits.float(), self.labels)

    def update(self) -> None:
        """Clip the gradients and make the step."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def count_bytes(self) -> dict[str, int]:
        """The bytes of the three parts of a step."""
        self()  # makes the state of the optimizer
        with ByteCounter() as forward:
            loss = self.forward()
        with ByteCounter() as backward:
            loss.backward()
        with ByteCounter() as optimizer:
            self.update()
        totals = forward.total, backward.total, optimizer.total
        return dict(zip(("forward", "backward", "optimizer"), totals, strict=True))


def matrix_product(
    device: torch.device, dtype: torch.dtype, side: int
) -> tuple[Callable[[], Any], int]:
    """A product of two square matrices, and its floating-point operations."""
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def large_copy(device: torch.device, nbytes: int) -> tuple[Callable[[], Any], int]:
    """A copy of so many bytes, and what it moves: it reads and writes them."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * nbytes


def measure_rooflines(
    models: Sequence[tuple[str, int]],
    batch_size: int,
    n_frames: int,
    num_classes: int,
    warmup: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> pd.DataFrame:
    """Two rows per model: a forward pass of the prepared model, and a training step.

    Args:
        models: name and image size of each model.
        repeats: rounds; in each the matrix product, the copy, the forward pass and the step take
            turns. The times are medians.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    product, product_flops = matrix_product(device, dtype, SIDE[kind])
    copy, copied = large_copy(device, COPIED[kind])
    rows = []
    for name, size in tqdm(models, "roofline", unit="model", leave=False):
        config = TrainConfig(model_name=name, n_frames=n_frames, image_size=size)
        torch.manual_seed(0)
        model = build_model(config, num_classes)
        clips = random_clips(batch_size, n_frames, size, device)
        prepared = prepare_for_inference(model, device, dtype)
        step = TrainingStep(model, clips, config, dtype)

        def forward(prepared: nn.Module = prepared, clips: torch.Tensor = clips) -> None:
            with torch.inference_mode():
                prepared(clips)

        # Not in inference mode, where PyTorch does not take some operators apart.
        with torch.no_grad(), ByteCounter() as counter:
            prepared(clips)
        moved = {"forward": {"forward": counter.total}, "training step": step.count_bytes()}
        with torch.no_grad():
            flops = {"forward": count_flops(lambda model=prepared, x=clips: model(x))}
        flops["training step"] = count_flops(step)
        calls = {"product": product, "copy": copy, "forward": forward, "training step": step}
        times = interleave(calls, repeats, device, warmup)
        seconds = {call: float(np.median(values)) for call, values in times.items()}
        peak, bandwidth = product_flops / seconds["product"], copied / seconds["copy"]
        for work in ("forward", "training step"):
            measured = roofline(
                flops[work], sum(moved[work].values()), seconds[work], peak, bandwidth
            )
            parts = {f"of it {part} (GB)": moved[work].get(part, 0) / 1e9 for part in PARTS}
            rows.append({"model": f"{name}, {size} px", "work": work, **measured, **parts})
    return pd.DataFrame(rows)


PARTS = ("forward", "backward", "optimizer")


def roofline(
    flops: float, moved: float, seconds: float, peak: float, bandwidth: float
) -> dict[str, float | str]:
    """What bounds a call, from what it computes and moves, and what the machine can.

    Args:
        flops: floating-point operations of the call.
        moved: bytes that it reads and writes.
        seconds: the time that it takes.
        peak: operations per second of the machine.
        bandwidth: bytes per second of its memory.
    """
    limits = {"compute": flops / peak, "memory": moved / bandwidth}
    bound = max(limits, key=limits.__getitem__)
    return {
        "GFLOPs": flops / 1e9,
        "moved (GB)": moved / 1e9,
        "FLOPs per byte": flops / moved,
        "measured (ms)": 1000 * seconds,
        "compute limit (ms)": 1000 * limits["compute"],
        "memory limit (ms)": 1000 * limits["memory"],
        "GFLOP/s": flops / seconds / 1e9,
        "peak (GFLOP/s)": peak / 1e9,
        "share of the peak (%)": 100 * limits["compute"] / seconds,
        "bandwidth (GB/s)": bandwidth / 1e9,
        "bound by": bound if limits[bound] >= EXPLAINED * seconds else "neither",
    }
