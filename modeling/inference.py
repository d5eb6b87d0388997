"""Preparation of a trained model for fast inference."""

import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from modeling.engines import Engine
from modeling.layers import Normalize
from utils.device import prepare_model
from utils.errors import UserError


class NotFiniteError(UserError):
    """A model gave NaN or infinity, which no class may be chosen from."""


def require_finite(outputs: torch.Tensor) -> torch.Tensor:
    """The outputs of a model, if all of them are finite.

    Raises:
        NotFiniteError: they are not.
    """
    if not outputs.isfinite().all():
        raise NotFiniteError(
            "the model's outputs are not finite: use --precision fp32, or another checkpoint if "
            "its weights are not finite either"
        )
    return outputs


_CONVS = (nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIMM_CONVS = ("Conv2dSame",)
_TIMM_NORMS = ("BatchNormAct2d", "SyncBatchNormAct")  # with an activation at their end


def _kinds(kinds: tuple[type, ...], names: tuple[str, ...]) -> tuple[type, ...]:
    """These types and timm's of these names, which a model has only if timm is imported."""
    layers = sys.modules.get("timm.layers")
    return kinds + (tuple(getattr(layers, name) for name in names) if layers else ())


def prepare_for_inference(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> nn.Module:
    """A copy of a model for evaluation only, as every script of this project runs it.

    BatchNorms are folded into the convolutions before them, the weights of the convolutions are
    laid out channels last, and weights are cast to `dtype` once instead of at every call, as
    autocast would. In fp32 the logits are those of the model up to rounding (1e-5). The given model
    is left as it is.

    Args:
        dtype: dtype of the weights, the activations and the logits; BatchNorms that could not be
            folded stay fp32.
        compile: also compile it with torch.compile; the first call is then slow.

    Returns:
        The copy, on `device`, in eval mode, its parameters without gradients. It takes what the
        model takes, `(B, T, C, H, W)`, uint8 preferably; call it in `torch.inference_mode()`. An
        `Engine`, which another runtime computes, is ready already and is returned itself.
    """
    if isinstance(model, Engine):
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batchnorms(model)
    for module in model.modules():
        if isinstance(module, Normalize):
            module.dtype = dtype
        elif not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    prepare_model(model, device, dtype)
    if compile:
        model.compile()
    return model


@torch.no_grad()
def fold_batchnorms(model: nn.Module) -> int:
    """Fold every BatchNorm that follows a convolution into it, in place. Returns how many.

    In eval mode a BatchNorm is a fixed scale and shift per channel, which the weights and bias of
    the convolution can carry. Which BatchNorm follows which convolution is not guessed from names:
    a small clip is sent through the model, and a pair is found where the output tensor of a
    convolution is the input of a BatchNorm and of nothing else. Nothing is folded in a model that
    takes no such clip.
    """
    # Of exactly these types: a convolution that standardises its weights would undo the scale.
    convs, norms = (
        [module for module in model.modules() if type(module) in kinds]
        for kinds in (_kinds(_CONVS, _TIMM_CONVS), _kinds(_NORMS, _TIMM_NORMS))
    )
    if not norms:
        return 0
    outputs = _Outputs()
    pairs: list[tuple[torch.Tensor, nn.Module]] = []

    def after_conv(conv: nn.Module, _: tuple, output: torch.Tensor) -> None:
        outputs.of[id(output)] = output, conv

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        pairs.append((inputs[0], norm))

    hooks = [norm.register_forward_pre_hook(before_norm) for norm in norms]
    hooks += [conv.register_forward_hook(after_conv) for conv in convs]
    channels, device = getattr(model, "channels", 3), next(model.parameters()).device
    own_size = getattr(getattr(model, "backbone", None), "frame_size", 32)
    try:
        for size in dict.fromkeys((32, own_size)):  # some networks take no small frames
            clip = torch.zeros(1, 2, channels, size, size, dtype=torch.uint8, device=device)
            with outputs, contextlib.suppress(RuntimeError, ValueError, AssertionError, IndexError):
                model(clip)
                break
            pairs.clear()  # an own model that takes clips of another size only stays as it is
            outputs.of.clear()
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(conv for _, conv in outputs.of.values())
    names = {module: name for name, module in model.named_modules()}
    folded = 0
    for x, norm in pairs:
        _, conv = outputs.of.get(id(x), (None, None))
        if conv is None or calls[conv] > 1 or outputs.uses[id(x)] > 1:
            continue
        # In place: a copy of the convolution would copy its hooks, and with them a TSM's shifts.
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
            norm.bias,
        )  # fmt: skip
        model.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        folded += 1
    return folded


class _Outputs(TorchFunctionMode):
    """The outputs of convolutions, which it keeps, and how many operators use each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, tuple[torch.Tensor, nn.Module]] = {}
        """by the output's id: the output and its convolution"""
        self.uses: Counter[int] = Counter()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor | tuple | list):  # not its shape, its device ...
            for value in (*args, *(kwargs or {}).values()):
                for x in value if isinstance(value, tuple | list) else [value]:
                    self.uses[id(x)] += id(x) in self.of
        return result


class PackedConv2d(nn.Conv2d):
    """A convolution whose weights are laid out for oneDNN once, by its first input.

    PyTorch lays them out again at every call, which takes a quarter of the time of a single frame
    (docs/results/speed.md). The operators are those that torch.compile uses on CPUs (private ones,
    seen in torch 2.11 to 2.14); the results are the same.
    """

    _packed: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = self.padding, self.stride, self.dilation, self.groups
        if self._packed is None:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = reorder(self.weight, *options, list(x.shape))
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self._packed, self.bias, *options, "none", [], "")


def pack_convolutions(model: nn.Module) -> int:
    """Turn a prepared model's convolutions into packed ones, in place, where that is possible: on a
    CPU, in fp32. Returns how many."""
    available = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_convolution_weight"
    )
    convs = [
        module
        for module in model.modules()
        if available
        and type(module) is nn.Conv2d
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for conv in convs:
        conv.__class__ = PackedConv2d  # the same object, with its weights and its hooks
        conv._packed = None
    return len(convs)
