"""Grad-CAM++ in space and time, on the last maps of a model.

Chattopadhay et al., "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks",
WACV 2018, arXiv:1710.11063. The sums of the paper over the positions of an image run here over all
positions of a clip, in space and in time, so that frames can be compared with each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from explanation.relevance import Relevance, Score, differentiable
from modeling.frame_encoder import FrameEncoder
from mvit import MViT
from r2plus1d_resnet import R2Plus1DResNet18
from timesformer import TimeSformer
from utils.errors import UserError
from video_swin import VideoSwin
from vivit import ViViT


@dataclass(frozen=True)
class Layer:
    """Where a model has its last maps."""

    module: nn.Module
    to_maps: Callable[..., torch.Tensor]
    """from the module's output (its inputs with `of_input`) to maps `(N, C, [T,] h, w)`; without T
    there is a row per frame"""
    of_input: bool = False
    """whether the input of the module is taken: the class token alone leaves the last block of a
    transformer, so that the output of the patches has no gradient"""
    stride: int = 0
    """frames from the centre of one time to that of the next, where that of the first is the first
    frame, as behind padded convolutions; 0: the times divide the clip evenly"""


def last_layers(model: nn.Module) -> list[Layer]:
    """The layers whose maps are explained: one, or two where motion has a network of its own.

    Raises:
        UserError: the model has no maps that are known here.
    """
    if isinstance(model, FrameEncoder):
        return [_of_backbone(backbone) for backbone in model.backbones()]
    if isinstance(model, R2Plus1DResNet18):
        # (B, C, T', h, w); three convolutions halve the time
        return [Layer(model.backbone.layer4, lambda x: x, stride=8)]
    if isinstance(model, VideoSwin):
        # (B, T', h, w, C)
        return [Layer(model.stages()["layer4"][-1], lambda x: x.permute(0, 4, 1, 2, 3))]
    if isinstance(model, MViT):
        return [Layer(model.backbone.blocks[-1], _of_mvit, of_input=True)]
    if isinstance(model, TimeSformer):
        to_maps = lambda x, n_frames: _grid(x[:, 1:].unflatten(1, (n_frames, -1)))  # noqa: E731
        return [Layer(model.blocks[-1], to_maps, of_input=True)]
    if isinstance(model, ViViT):
        block, times = model.spatial[-1], model.embedding.positions.shape[1]
        if model.temporal_norm is None:  # joint attention: (B, T' * patches, dim)
            to_maps = lambda x, *_: _grid(x.unflatten(1, (times, -1)))  # noqa: E731
            return [Layer(block, to_maps, of_input=True)]
        return [Layer(block, lambda x, *_: _grid(x[:, 1:]), of_input=True)]  # (B * T', ...)
    if layer := _last_maps(model):
        return [Layer(layer, lambda x: x)]
    raise UserError(
        f"gradcam++ is not defined for {type(model).__name__}, which has no convolution: choose "
        "--method occlusion"
    )


def _last_maps(model: nn.Module) -> nn.Module | None:
    """The last convolution of a model of one's own, or the normalisation and activation after it;
    None: it has no convolution."""
    leaves = [
        module
        for modules in model.stages().values()
        for part in modules
        for module in part.modules()
        if not any(module.children())
    ]
    convs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Conv2d | nn.Conv3d)]
    if not convs:
        return None
    last = convs[-1]
    while last + 1 < len(leaves) and type(leaves[last + 1]).__module__.startswith(_SAME_SHAPE):
        last += 1
    return leaves[last]


_SAME_SHAPE = ("torch.nn.modules.activation", "torch.nn.modules.batchnorm")


def _of_backbone(backbone: nn.Module) -> Layer:
    """The last maps of a network of frames, `(B * T, C, h, w)`."""
    stages = {name: modules for name, modules in backbone.stages().items() if modules}
    last = [name for name in stages if name.startswith("layer")][-1]
    if getattr(backbone, "has_tokens", False):  # of timm: (B * T, prefix + patches, C)
        prefix = backbone.net.num_prefix_tokens
        blocks = [module for module in stages[last] if any(module.children())]
        return Layer(blocks[-1], lambda x, *_: _grid(x[:, prefix:]), of_input=True)
    if getattr(getattr(backbone, "net", None), "output_fmt", None) == "NHWC":
        return Layer(stages[last][-1], lambda x: x.permute(0, 3, 1, 2))
    if hasattr(backbone, "conv_head"):  # EfficientNet-Lite0 has a convolution after its layers
        return Layer(backbone.bn2, lambda x: x)
    return Layer(stages[last][-1], lambda x: x)


def _grid(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(N, [T,] patches, C)` as maps `(N, C, [T,] h, w)` of square frames."""
    side = round(tokens.shape[-2] ** 0.5)
    return tokens.unflatten(-2, (side, -1)).movedim(-1, 1)


def _of_mvit(tokens: torch.Tensor, thw: Sequence[int]) -> torch.Tensor:
    """The input of a block, a class token before T' * h * w others, as maps."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, tuple(thw))


@dataclass(frozen=True)
class _Recorded:
    """What a layer held in the last call of the model."""

    x: torch.Tensor
    """a leaf: the graph of the gradients begins here, so that nothing before is differentiated"""
    to_maps: Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def _recorded(layers: Sequence[Layer]) -> Iterator[list[_Recorded]]:
    """Within this block the list holds what the layers held in the calls of the model."""
    recorded: list[_Recorded] = []

    def leaf(layer: Layer, x: torch.Tensor, others: tuple) -> torch.Tensor:
        x = x.detach().requires_grad_()
        recorded.append(_Recorded(x, lambda x: layer.to_maps(x, *others)))
        return x.clone()  # what follows may work in place, which a leaf does not allow

    def before(layer: Layer, _: nn.Module, inputs: tuple) -> tuple:
        return leaf(layer, inputs[0], inputs[1:]), *inputs[1:]

    def after(layer: Layer, _: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        return leaf(layer, output, ())

    hooks = [
        layer.module.register_forward_pre_hook(partial(before, layer))
        if layer.of_input
        else layer.module.register_forward_hook(partial(after, layer))
        for layer in layers
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def gradcam_plus_plus(model: nn.Module, clips: torch.Tensor, score: Score) -> Relevance:
    """The relevance of each cell of the last maps, and their sum for each frame.

    Where the maps have fewer times than the clip, the frames between are interpolated.

    Args:
        model: in eval mode.
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].
        score: what is explained.

    Raises:
        UserError: the model has no maps that are known here.
    """
    layers = last_layers(model)
    with torch.enable_grad(), differentiable(model), _recorded(layers) as recorded:
        scores = score(model(clips)).sum()  # clips do not depend on each other
        gradients = torch.autograd.grad(scores, [layer.x for layer in recorded])
    b, t = clips.shape[:2]
    maps = sum(
        weighted_maps(_of_clips(layer.to_maps(layer.x), b), _of_clips(layer.to_maps(gradient), b))
        for layer, gradient in zip(recorded, gradients, strict=True)
    )  # (B, T', h, w)
    maps = _at_frames(maps, t, layers[0].stride)
    return Relevance(maps.cpu(), maps.sum((2, 3)).cpu())


def _at_frames(maps: torch.Tensor, n_frames: int, stride: int) -> torch.Tensor:
    """Maps `(B, T', h, w)`, interpolated linearly at the frames, `(B, T, h, w)`; frames beyond the
    first and the last centre have the map of that one.

    Args:
        stride: see `Layer`.
    """
    if not stride:
        size = n_frames, *maps.shape[2:]
        return F.interpolate(maps.unsqueeze(1), size, mode="trilinear").squeeze(1)
    at = (torch.arange(n_frames, device=maps.device) / stride).clamp(max=maps.shape[1] - 1)
    before, after = at.floor().long(), at.ceil().long()
    return torch.lerp(maps[:, before], maps[:, after], (at - before)[:, None, None])


def _of_clips(maps: torch.Tensor, clips: int) -> torch.Tensor:
    """Maps of frames, `(B * T', C, h, w)`, or of clips, as `(B, C, T', h, w)` float32."""
    maps = maps.detach().float()
    return maps if maps.dim() == 5 else maps.unflatten(0, (clips, -1)).transpose(1, 2)


def weighted_maps(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The positive part of the weighted sum of maps (equations 5, 6 and 19 of the paper).

    With g the gradient of the score and S the sum of a channel over all positions,
    alpha = g^2 / (2 g^2 + S g^3) and the weight of the channel is the sum of alpha * relu(g).
    Dividing by g^2 keeps small gradients from vanishing. The derivation needs maps that are not
    negative, as behind a ReLU; tokens may be, and only their positive part counts in S, so that
    alpha stays between 0 and 1/2.

    Args:
        maps, gradients: `(B, C, T, h, w)`.

    Returns:
        `(B, T, h, w)`.
    """
    positive = gradients.clamp(min=0)
    total = maps.clamp(min=0).sum((2, 3, 4), keepdim=True)  # (B, C, 1, 1, 1)
    weights = (positive / (2 + positive * total)).sum((2, 3, 4), keepdim=True)
    # The weights hold for the whole clip. Frames that the score does not depend on (later ones than
    # the answer of a causal model, those that the maximum over time leaves out) have no relevance.
    used = (gradients != 0).any(dim=4).any(dim=3).any(dim=1)[..., None, None]  # (B, T, 1, 1)
    return (weights * maps).sum(1).clamp(min=0) * used
