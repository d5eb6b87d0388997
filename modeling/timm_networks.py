"""Networks of timm (PyTorch image models) by name: how they are built, divided and filled.

https://github.com/huggingface/pytorch-image-models, arXiv:2110.00476. What differs
between networks is asked of timm; only VARIANTS are written for single ones.
"""

import difflib
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import convnext, metaformer, model_entrypoint, regnet, resnet
from timm.models._manipulate import group_with_matcher
from torch import nn

from modeling.layers import MeanStd
from utils.errors import UserError, first_line
from utils.structure import short_repr


def create_network(name: str) -> nn.Module:
    """The network of that name without its classifier, with random weights.

    A network with position embeddings takes frames of other sizes than its own where timm offers
    that; the embeddings keep the shape of its files, and are interpolated in every call.

    Args:
        name: as timm lists it, with or without the tag of its weights: `resnet34.a1_in1k`.

    Raises:
        UserError: timm has no such network; the message names similar ones.
    """
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31):
        # Earlier ones cannot be built on the meta device, or do not tell the width of all features.
        have = timm.__version__
        raise UserError(f"backbone timm:NAME needs timm 1.0.31, not {have}: pip install -U timm")
    if name in VARIANTS:
        return VARIANTS[name]()
    known = timm.list_models()
    # Nothing but these names: others stand for files and for repositories of other people.
    if name not in known and name not in timm.list_models(include_tags=True):
        similar = difflib.get_close_matches(name.split(".")[0], known, n=5)
        meant = f": did you mean {', '.join(similar)}?" if similar else ""
        raise UserError(f"timm {timm.__version__} has no network {short_repr(name)}{meant}")
    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:  # it has no such option
        return timm.create_model(name, num_classes=0)


def _caformer_s18_relu() -> nn.Module:
    """SurgeNet's CAFormer-S18: ReLU where timm's has StarReLU."""
    net = timm.create_model("caformer_s18", num_classes=0)
    for name, module in list(net.named_modules()):
        if isinstance(module, metaformer.StarReLU):
            net.set_submodule(name, nn.ReLU())
    return net


def _dinov3_qkv_bias(size: str) -> nn.Module:
    """SurgeNetXL's DINOv3 ViT: no register tokens, and a bias of queries, keys and values.

    timm has those of queries and values only.
    """
    net = timm.create_model(
        f"vit_{size}_patch16_dinov3_qkvb",
        num_classes=0,
        global_pool="token",
        num_reg_tokens=0,
        dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    for block in net.blocks:
        attention = block.attn
        attention.qkv = nn.Linear(attention.qkv.in_features, attention.qkv.out_features)
        attention.q_bias = attention.k_bias = attention.v_bias = None
    return net


def _dinov2_336(size: str) -> nn.Module:
    """SurgeNetXL's DINOv2 ViT: positions for frames of 336 pixels, where timm's are for 518."""
    name = f"vit_{size}_patch14_dinov2"
    return timm.create_model(name, num_classes=0, img_size=336, dynamic_img_size=True)


VARIANTS = {
    "caformer_s18_relu": _caformer_s18_relu,
    **{f"dinov2_{s}_336": partial(_dinov2_336, s) for s in ("small", "base", "large")},
    **{f"dinov3_{s}_qkv_bias": partial(_dinov3_qkv_bias, s) for s in ("small", "base", "large")},
}
"""networks of public encoders that differ from timm's in a detail"""


def first_convolution(net: nn.Module) -> str:
    """The name of the only convolution that sees the pixels; empty if there is none."""
    name = net.pretrained_cfg.get("first_conv")
    conv = net.get_submodule(name) if isinstance(name, str) else None
    return name if isinstance(conv, nn.Conv2d) and conv.in_channels == 3 else ""


class Stage(NamedTuple):
    """What belongs to a stage, by name."""

    modules: list[str]
    parameters: list[str]
    """those of modules that hold parts of other stages too"""


def divide(net: nn.Module) -> dict[str, Stage]:
    """The stages from stem to features: `stem`, `layer1`, `layer2` ... and `top` if it has weights.

    A layer is a block of a transformer, or a stage of a CNN, as timm groups them for layer-wise
    learning rates; its modules are the blocks.

    Raises:
        UserError: stages share weights.
    """
    names = [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]
    layers, blocks = _numbers(net, names, coarse=True), _numbers(net, names, coarse=False)
    stages: dict[int, Stage] = defaultdict(lambda: Stage([], []))
    listed = 0

    def visit(module: nn.Module, name: str) -> None:
        """List the largest modules that belong to a single block."""
        nonlocal listed
        prefix = f"{name}." if name else ""
        inside = {(layers[key], blocks[key]) for key in names if key.startswith(prefix)}
        if name and len(inside) == 1:
            stages[inside.pop()[0]].modules.append(name)
            listed += len(list(module.parameters()))
        elif inside:
            for key, _ in module.named_parameters(name, recurse=False):
                stages[layers[key]].parameters.append(key)
                listed += 1
            for key, child in module.named_children():
                visit(child, prefix + key)

    visit(net, "")
    if listed != len(list(net.parameters())):
        name = net.pretrained_cfg["architecture"]
        raise UserError(f"timm:{name} shares weights between its layers: choose another backbone")
    top = layers[""]
    numbers = sorted(stages.keys() - {top})
    named = {f"layer{k}" if k else "stem": stages[number] for k, number in enumerate(numbers)}
    return named | ({"top": stages[top]} if top in stages else {})


def _numbers(net: nn.Module, names: list[str], coarse: bool) -> dict[str, int]:
    """The number of the group that timm puts each parameter and buffer in, from stem to head.

    `""` gets the number of all that timm leaves to the head.
    """
    if hasattr(net, "group_matcher") and type(net).__name__ != "RDNet":
        matcher = net.group_matcher(coarse=coarse)
    else:  # it has none, or no coarse one
        block = r"^(?:\w*stages|transformers|blocks)\.(\d+)"
        block += "" if coarse else r"\.\w+\.(\d+)"
        matcher = {"stem": r"^\w*(?:stem|patch_embed|pos_embed|cls_token)", "blocks": block}
    return group_with_matcher(((name, None) for name in [*names, ""]), matcher, reverse=True)


def layer_inputs(name: str, stages: Mapping[str, Stage]) -> list[str]:
    """The names of the modules whose input is the input of a layer; empty if one of these is not a
    single map of channels, `(N, C, H, W)`.

    They are found by one frame on the meta device, where nothing is computed.

    Args:
        name: the network.
        stages: what `divide` gives for it.
    """
    first: dict[str, tuple[str, tuple[Any, ...]]] = {}  # of each layer: the module and its input

    def record(stage: str, name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        first.setdefault(stage, (name, inputs))

    with torch.device("meta"):
        net = create_network(name).eval()
        for stage in (stage for stage in stages if stage.startswith("layer")):
            for module in stages[stage].modules:
                hook = partial(record, stage, module)
                net.get_submodule(module).register_forward_pre_hook(hook)
        net(torch.zeros(1, *net.pretrained_cfg["input_size"]))
    shapes = [[getattr(x, "shape", ()) for x in inputs] for _, inputs in first.values()]
    # The frame is square: the two sides are equal where the channels come before them.
    if all(len(s) == 1 and len(s[0]) == 4 and s[0][2] == s[0][3] for s in shapes):
        return [module for module, _ in first.values()]
    return []


# The first module of the residual branch of each kind of block.
_BRANCHES = {
    resnet.BasicBlock: "conv1",
    resnet.Bottleneck: "conv1",
    regnet.Bottleneck: "conv1",
    convnext.ConvNeXtBlock: "conv_dw",
    efficientnet.ConvBnAct: "conv",
    efficientnet.DepthwiseSeparableConv: "conv_dw",
    efficientnet.InvertedResidual: "conv_pw",
    efficientnet.UniversalInvertedResidual: "dw_start",
    efficientnet.EdgeResidual: "conv_exp",
}


def residual_branches(net: nn.Module) -> list[str]:
    """The names of the first module of each residual branch that has an identity path beside it.

    Only blocks of ResNets, RegNets, ConvNeXts, EfficientNets and MobileNets are known.
    """
    branches = []
    for name, block in net.named_modules():
        kind = next((kind for kind in _BRANCHES if isinstance(block, kind)), None)
        if kind is regnet.Bottleneck:
            has_identity = block.downsample is not None
        else:
            has_identity = getattr(block, "has_skip", True)
        if kind and has_identity:
            branches.append(f"{name}.{_BRANCHES[kind]}")
    return branches


class Pretrained(NamedTuple):
    """timm's pretrained weights of a network."""

    path: Path
    remedy: str
    """what the user can do if the file is damaged"""
    provenance: dict[str, str]
    """see `modeling.weights.LoadedWeights`"""
    mean_std: MeanStd


def pretrained_file(net: nn.Module, name: str) -> Pretrained:
    """timm's file of pretrained weights for a network; downloaded if it is not in the cache.

    Args:
        name: the network, for messages.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    source = net.pretrained_cfg
    hub, url = source.get("hf_hub_id"), source.get("url")
    if not hub and not url:
        raise UserError(
            f"timm has no pretrained weights of {name}: give --weights none to train it from "
            "scratch, or a file"
        )
    file = source.get("hf_hub_filename") or "model.safetensors" if hub else Path(url).name
    place = f"{file} of https://huggingface.co/{hub}" if hub else url
    remedy = (
        f"get the weights of {name} ({place}) by other means and give them as --weights FILE, or "
        "give --weights none to train from scratch"
    )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every try
    try:
        if hub:
            path = Path(hf_hub_download(hub, file))
        else:
            path = Path(torch.hub.get_dir()) / "checkpoints" / file
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path))
    except Exception as error:  # network errors have many types
        raise UserError(
            f"cannot download pretrained weights ({first_line(error)}): {remedy}"
        ) from None
    # The hub's cache has links to its files: without the link alone the same file would come back.
    remedy = f"delete {path.resolve()} and run again, or {remedy}"
    licence = (source.get("license") or "not stated").upper()
    provenance = {"file": file, "encoder": name, "licence": licence}
    return Pretrained(path, remedy, provenance, (tuple(source["mean"]), tuple(source["std"])))


def to_own_names(
    net: nn.Module, state: dict[str, torch.Tensor], source: str | Path
) -> dict[str, torch.Tensor]:
    """The tensors of a file under the names that timm gives them, without the classifier.

    timm knows the names in the files of the networks' authors, and fits position embeddings to the
    network's size.

    Args:
        source: the file, for messages.

    Raises:
        UserError: timm can make nothing of them.
    """
    architecture = net.pretrained_cfg["architecture"]
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    state = {str(key).removeprefix("net."): value for key, value in state.items()}  # a TimmBackbone
    if all(key.startswith("encoder.") and key not in state for key in shapes):
        # `modeling.weights.find_weights` took it for the prefix of another program.
        state = {f"encoder.{key}": value for key, value in state.items()}
    if {key: value.shape for key, value in state.items()} == shapes:
        return state  # timm's own names
    with torch.device("meta"):
        whole = timm.create_model(architecture, pretrained_cfg=net.pretrained_cfg, num_classes=1)
    module = sys.modules[model_entrypoint(architecture).__module__]
    if rename := getattr(module, "checkpoint_filter_fn", None):
        try:
            state = rename(state, whole)
        except Exception as error:  # the names and shapes are a file's, and may be anything
            raise UserError(
                f"{source} does not fit {type(net).__name__}: {first_line(error)}"
            ) from None
    classifier = whole.state_dict().keys() - shapes.keys()
    return {key: value for key, value in state.items() if key not in classifier}
