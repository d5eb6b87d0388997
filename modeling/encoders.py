"""Public encoders, surgical and general: where they are, how their files look, who may use them.

`--weights FILE` recognises a file by the names and shapes of its tensors. Everything in it is then
loaded, or left out for a reason that is told; what is missing is an error.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from modeling.layers import IMAGENET_MEAN_STD, MeanStd
from modeling.vit import SIZES
from utils.errors import ResultWarning

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """A network that others have trained."""

    name: str
    flags: str
    """settings with which a model takes it"""
    source: str
    """where the user gets it, or the file"""
    parameters: float
    """in millions"""
    licence: str
    """of the weights: an SPDX identifier, or in words"""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """tensors by which its file is recognised; empty: `--weights default` downloads it"""
    mean_std: MeanStd | None = IMAGENET_MEAN_STD
    """normalisation; None: files that look like this have several"""


_HUB = "https://huggingface.co/"
_SURGENET = _HUB + "TimJaspersTue/SurgeNetModels"
_SURGENET_DINO = _HUB + "rlpddejong/SurgeNetXL_DINOv1-v3"
_CAMMA = "https://github.com/CAMMA-public/"
_DIM = {size: dim for size, (dim, *_) in SIZES.items()}


def _vit_shapes(size: str, patch_size: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """What tells the file of an image ViT of this size from others."""
    dim = _DIM[size]
    return {
        "patch_embed.proj.weight": (dim, 3, patch_size, patch_size),
        "pos_embed": (1, tokens, dim),
        "blocks.11.attn.qkv.weight": (3 * dim, dim),
    }


_TIMESFORMER_SHAPES = _vit_shapes("base", 16, 197) | {"time_embed": (1, 8, 768)}

# Sources and licences as their authors state them.
ENCODERS = (
    # Surgical
    Encoder(
        "SurgeNet or SurgeNetXL CAFormer-S18",
        "--backbone caformer_s18_relu",
        _SURGENET,
        23.2,
        "CC-BY-NC-4.0",
        {
            "downsample_layers.0.conv.weight": (64, 3, 7, 7),
            "stages.2.8.token_mixer.qkv.weight": (960, 320),
        },
    ),
    Encoder(
        "SurgeNet ConvNeXtV2-Tiny",
        "--backbone timm:convnextv2_tiny",
        _SURGENET,
        27.9,
        "CC-BY-NC-4.0",
        {
            "downsample_layers.0.0.weight": (96, 3, 4, 4),
            "stages.0.0.grn.gamma": (1, 1, 1, 384),
        },
    ),
    Encoder(
        "SurgeNet PVTv2-B2",
        "--backbone timm:pvt_v2_b2",
        _SURGENET,
        24.8,
        "CC-BY-NC-4.0",
        {"patch_embed1.proj.weight": (64, 3, 7, 7), "block3.5.attn.q.weight": (320, 320)},
    ),
    *(
        Encoder(
            f"SurgeNetXL DINOv1 ViT-{size.title()}/16",
            f"--model-name timesformer --model-size {size}, or --backbone "
            f"timm:vit_{size}_patch16_224",
            _SURGENET_DINO,
            parameters,
            "CC-BY-NC-SA-4.0",
            _vit_shapes(size, 16, 197),
        )
        for size, parameters in (("small", 21.7), ("base", 85.8))
    ),
    *(
        Encoder(
            f"SurgeNetXL DINOv2 ViT-{size.title()}/14",
            f"--backbone dinov2_{size}_336",
            _SURGENET_DINO,
            parameters,
            "CC-BY-NC-SA-4.0",
            _vit_shapes(size, 14, 577) | {"blocks.0.ls1.gamma": (_DIM[size],)},
        )
        for size, parameters in (("small", 21.8), ("base", 86.0), ("large", 303.5))
    ),
    *(
        Encoder(
            f"SurgeNetXL DINOv3 ViT-{size.title()}/16",
            f"--backbone dinov3_{size}_qkv_bias",
            _SURGENET_DINO,
            parameters,
            "CC-BY-NC-SA-4.0",
            {
                "patch_embed.proj.weight": (_DIM[size], 3, 16, 16),
                "blocks.0.gamma_1": (_DIM[size],),
                "blocks.11.attn.qkv.bias": (3 * _DIM[size],),
            },
        )
        for size, parameters in (("small", 21.6), ("base", 85.7), ("large", 303.1))
    ),
    Encoder(
        "LemonFM (ConvNeXt-Large)",
        "--backbone convnext_large",
        _HUB + "visurg/LemonFM",
        196.2,
        "not stated in its repository",
        {"features.0.0.weight": (192, 3, 4, 4), "features.7.2.block.5.weight": (1536, 6144)},
    ),
    Encoder(
        "PL-Stitch ViT-Base/16",
        "--model-name timesformer --model-size base, or --backbone timm:vit_base_patch16_224",
        _HUB + "visurg/PL-Stitch",
        85.8,
        "not stated in its repository",
        _vit_shapes("base", 16, 197),
    ),
    Encoder(
        "Endo-FM (TimeSformer, 8 frames)",
        "--model-name timesformer --model-size base",
        "https://github.com/med-air/Endo-FM",
        121.3,
        "Apache-2.0 (README) or MIT (LICENSE)",
        _TIMESFORMER_SHAPES,
        ((0.45,) * 3, (0.225,) * 3),
    ),
    Encoder(
        "SurgRec-MAE (VideoMAE ViT-Base)",
        "--model-name vivit --model-size base --attention joint --tubelet-frames 2",
        _HUB + "SichengLu/SurgRec",
        86.2,
        "CC-BY-NC-4.0",
        {"patch_embed.proj.weight": (768, 3, 2, 16, 16), "blocks.11.attn.q_bias": (768,)},
    ),
    Encoder(
        "EndoViT (ViT-Base/16)",
        "--model-name timesformer --model-size base, or --backbone timm:vit_base_patch16_224",
        _HUB + "egeozsoy/EndoViT",
        85.8,
        "not stated; it began from CC-BY-NC-4.0 weights",
        _vit_shapes("base", 16, 197) | {"decoder_embed.weight": (512, 768)},
        ((0.3464, 0.2280, 0.2228), (0.2520, 0.2128, 0.2093)),
    ),
    Encoder(
        "PeskaVLP, HecVL or SurgVLP (ResNet-50)",
        "--backbone resnet50",
        _CAMMA + "SurgVLP",
        23.5,
        "CC-BY-NC-SA-4.0",
        {"backbone_img.model.layer4.2.conv3.weight": (2048, 512, 1, 1)},
    ),
    Encoder(
        "SelfSupSurg (ResNet-50)",
        "--backbone resnet50",
        _CAMMA + "SelfSupSurg",
        23.5,
        "CC-BY-NC-SA-4.0",
        {"_feature_blocks.layer4.2.conv3.weight": (2048, 512, 1, 1)},
    ),
    # General
    Encoder(
        "TimeSformer, Kinetics-400 (8 frames)",
        "--model-name timesformer --model-size base",
        "https://github.com/facebookresearch/TimeSformer",
        121.3,
        "CC-BY-NC-4.0",
        {**_TIMESFORMER_SHAPES, "head.weight": (400, 768)},
        ((0.45,) * 3, (0.225,) * 3),
    ),
    *(
        Encoder(
            f"ImageNet ViT-{size.title()}/16",
            f"--model-name timesformer --model-size {size}, or vivit, or --backbone "
            f"timm:vit_{size}_patch16_224",
            "timm",
            parameters,
            "Apache-2.0",
            _vit_shapes(size, 16, 197) | {"head.weight": (1000, _DIM[size])},
            None,
        )
        for size, parameters in (("tiny", 5.5), ("small", 21.7), ("base", 85.8))
    ),
    *(
        Encoder(
            f"DINOv2 ViT-{size.title()}/14",
            f"--backbone timm:vit_{size}_patch14_dinov2, or --model-name timesformer "
            f"--model-size {size} --patch-size 14",
            "timm",
            parameters,
            "Apache-2.0",
            _vit_shapes(size, 14, 1370),
        )
        for size, parameters in (("small", 22.1), ("base", 86.6))
    ),
    *(
        Encoder(name, f"--backbone timm:{network}", "timm", parameters, licence)
        for name, network, parameters, licence in (
            ("DINOv3 ViT-Small/16", "vit_small_patch16_dinov3", 21.6, "DINOv3 License"),
            ("DINOv3 ViT-Base/16", "vit_base_patch16_dinov3", 85.6, "DINOv3 License"),
            ("ConvNeXt-Tiny", "convnext_tiny", 27.8, "Apache-2.0"),
            ("ConvNeXtV2-Tiny", "convnextv2_tiny", 27.9, "CC-BY-NC-4.0"),
            ("CAFormer-S18", "caformer_s18", 23.2, "Apache-2.0"),
        )
    ),
    Encoder(
        "ConvNeXt-Large, ImageNet",
        "--backbone convnext_large",
        "torchvision",
        196.2,
        "BSD-3-Clause",
        {"features.0.0.weight": (192, 3, 4, 4), "classifier.2.weight": (1000, 1536)},
    ),
)


def list_encoders() -> str:
    """The text of `train.py --list-encoders`: three lines per encoder."""
    lines = []
    for encoder in ENCODERS:
        file = "FILE" if encoder.shapes else "default"
        lines += [
            f"{encoder.name}: {encoder.parameters:g} million parameters, {encoder.licence}",
            f"    {encoder.flags}, with --weights {file}",
            f"    from {encoder.source}",
        ]
    return "\n".join(lines)


def recognise(weights: Mapping[str, torch.Tensor]) -> Encoder | None:
    """The encoder in a file, by the names and shapes of its tensors.

    Several encoders of one architecture can look alike: then one that stands for all of them is
    returned, with the names and licences of all, and a normalisation if they agree on it.
    """
    inside = select_encoder(weights)[0]

    def fits(encoder: Encoder) -> bool:
        return bool(encoder.shapes) and any(
            all(key in names and tuple(names[key].shape) == s for key, s in encoder.shapes.items())
            for names in (weights, inside)
        )

    fitting = [encoder for encoder in ENCODERS if fits(encoder)]
    most = max((len(encoder.shapes) for encoder in fitting), default=0)
    alike = [encoder for encoder in fitting if len(encoder.shapes) == most]
    if not alike:
        return None
    names, licences, mean_stds = (
        list(dict.fromkeys(getattr(encoder, name) for encoder in alike))
        for name in ("name", "licence", "mean_std")
    )
    return replace(
        alike[0],
        name=" or ".join(names),
        licence=" or ".join(licences),
        mean_std=mean_stds[0] if len(mean_stds) == 1 else None,
    )


def licence_warning(provenance: Mapping[str, str]) -> list[ResultWarning]:
    """A warning if the weights that a model was trained from may not be used commercially.

    Args:
        provenance: see `modeling.weights.LoadedWeights`.
    """
    licence = provenance.get("licence", "")
    if not re.search(r"\bNC\b", licence):
        return []
    text = (
        f"trained from {provenance.get('encoder', 'weights')} ({licence}): not for commercial use"
    )
    return [{"kind": "other", "text": text}]


# What other programs put before the names of an encoder that is a part of a larger network.
_PARTS = (
    *("module.", "backbone_img.model.", "backbone_img.", "backbone.", "encoder.", "teacher."),
    *("trunk.", "_feature_blocks."),
)


def select_encoder(weights: Mapping[str, torch.Tensor]) -> tuple[Weights, list[str]]:
    """The tensors of the encoder without its prefix, and the names of all others."""
    selected, others = dict(weights), []
    while prefix := next((p for p in _PARTS if any(k.startswith(p) for k in selected)), ""):
        others += [key for key in selected if not key.startswith(prefix)]
        selected = {
            key.removeprefix(prefix): value
            for key, value in selected.items()
            if key.startswith(prefix)
        }
    return selected, others


# Tensors that no model here has, by the beginning or the end of their names, and why.
_UNUSED = {
    "classifier or projection head": (
        *("head.", "heads.", "head_dist.", "fc.", "_fc.", "classifier.", "dino_head."),
        "ibot_head.",
    ),
    "used in pretraining only": ("mask_token", "masked_embed", "decoder", "encoder_to_decoder."),
    "computed by the model": ("pos_embed_buffer", "rope_embed.periods"),
}
_COUNTERS = (".total_ops", ".total_params")


def drop_unused(
    weights: Mapping[str, torch.Tensor], own: Container[str], others: Sequence[str]
) -> tuple[Weights, str]:
    """The tensors without those that no model of this project has, such as classifiers.

    Args:
        own: the model's own names, which are never dropped.
        others: names of tensors outside of the encoder, of `select_encoder`.

    Returns:
        The tensors, and for the log which ones of the file are not loaded and why.
    """
    used, dropped = {}, Counter()
    for name, value in weights.items():
        why = next((why for why, p in _UNUSED.items() if name.startswith(p)), "")
        why = why or ("counters" if name.endswith(_COUNTERS) else "")
        if why and name not in own:
            dropped[name.split(".")[0], why] += 1
        else:
            used[name] = value
    dropped.update((name.split(".")[0], "not part of the encoder") for name in others)
    parts = [f"{count} of {name} ({why})" for (name, why), count in dropped.items()]
    return used, f"; not loaded: {', '.join(parts)}" if parts else ""
