"""A trained model made ready to answer fast."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modeling.layers import Normalize
from utils.device import suit_device

_CONVS = (nn.Conv2d, nn.Conv3d)

_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def prepare_for_inference(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> nn.Module:
    """A copy of a model for `eval` work only, the way every script of this project runs one.

    BatchNorms are folded into the convolutions before them, the convolutions' weights are laid out
    channels last, and the weights are cast to `dtype` once instead of at every call, as autocast
    would. In fp32 the logits are the model's own up to rounding (1e-5). The given model is left as
    it is.

    Args:
        dtype: of the weights, the activations and the logits; BatchNorms that could not be folded
            stay fp32.
        compile: also torch.compile it; the first call is then slow.

    Returns:
        The copy, on `device`, in eval mode, its parameters without gradients. It takes what the
        model takes, `(B, T, C, H, W)`, uint8 preferably; call it in `torch.inference_mode()`.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batchnorms(model)
    for module in model.modules():
        if isinstance(module, Normalize):
            module.dtype = dtype
        elif not isinstance(module, _NORMS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    suit_device(model, device, dtype)
    if compile:
        model.compile()
    return model


@torch.no_grad()
def fold_batchnorms(model: nn.Module) -> int:
    """Fold every BatchNorm that follows a convolution into it, in place. Returns how many.

    In eval mode a BatchNorm is a fixed scale and shift a channel, which the convolution's weights
    and bias can carry. Which BatchNorm follows which convolution is not guessed from names: a small
    clip is sent through the model, and a pair is one where the very tensor that a convolution put
    out goes into a BatchNorm.
    """
    norms = [module for module in model.modules() if type(module) in _NORMS]
    if not norms:
        return 0
    outputs: list[tuple[torch.Tensor, nn.Module]] = []  # the tensors, held so that none is reused
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def leaving(conv: nn.Module, _: tuple, output: torch.Tensor) -> None:
        outputs.append((output, conv))

    def entering(norm: nn.Module, inputs: tuple) -> None:
        pairs.extend((conv, norm) for output, conv in outputs if output is inputs[0])

    hooks = [norm.register_forward_pre_hook(entering) for norm in norms]
    hooks += [m.register_forward_hook(leaving) for m in model.modules() if isinstance(m, _CONVS)]
    shape = (1, 2, getattr(model, "channels", 3), 32, 32)
    model(torch.zeros(shape, dtype=torch.uint8, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    once = [conv for conv, _ in pairs]
    names = {module: name for name, module in model.named_modules()}
    folded = [(conv, norm) for conv, norm in pairs if once.count(conv) == 1]
    for conv, norm in folded:
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(names[norm], nn.Identity())
    return len(folded)


class PackedConv2d(nn.Module):
    """A convolution whose weights are laid out for oneDNN once, by its first input.

    PyTorch lays them out anew at every call, which takes a quarter of the time of a single frame
    (RESULTS.md). The operators are those that torch.compile uses on CPUs; the results are the same.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._how = conv.padding, conv.stride, conv.dilation, conv.groups
        self._weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight is None:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._weight = reorder(self.conv.weight, *self._how, list(x.shape))
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self._weight, self.conv.bias, *self._how, "none", [], "")


def pack_convolutions(model: nn.Module) -> int:
    """Replace a prepared model's convolutions by packed ones, in place, where that is possible: on
    a CPU, in fp32. Returns how many."""
    able = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_convolution_weight"
    )
    convs = [
        (name, module)
        for name, module in model.named_modules()
        if able
        and type(module) is nn.Conv2d
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for name, conv in convs:
        model.set_submodule(name, PackedConv2d(conv))
    return len(convs)
