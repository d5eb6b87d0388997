"""The methods by name: which one a model gets, and relevance for a class."""

import torch
from torch import nn

from explanation.baseline import Reference
from explanation.gradcam import gradcam_plus_plus, last_layers
from explanation.integrated_gradients import integrated_gradients
from explanation.occlusion import occlusion, temporal_occlusion
from explanation.relevance import Method, Relevance, Score
from explanation.rollout import rollout
from timesformer import TimeSformer
from utils.errors import UserError
from vivit import ViViT

DEFAULT_METHODS: dict[str, Method] = {
    "tsm_resnet": "gradcam++",
    "r2plus1d": "occlusion",
    "cnnlstm": "occlusion",
    "vivit": "occlusion",
    "timesformer": "rollout",
    "video_swin": "occlusion",
    "mvit": "occlusion",
}
"""the fastest method of each model that passed; where none did, the one that points best"""

PASSED: dict[str, tuple[Method, ...]] = {
    "tsm_resnet": ("gradcam++", "occlusion"),
    "r2plus1d": ("occlusion",),
    "cnnlstm": (),
    "vivit": (),
    "timesformer": (),
    "video_swin": (),
}
"""the methods of each model that passed all checks, see docs/results/explanations.md; MViT was not
checked"""


def default_method(model_name: str, of_class: bool = False) -> Method:
    """The method for a model, by its `model_name`; occlusion needs nothing of a model.

    Args:
        of_class: whether a certain class is explained: rollout knows none.
    """
    method = DEFAULT_METHODS.get(model_name, "occlusion")
    return "occlusion" if of_class and method == "rollout" else method


def advice(model_name: str, method: Method) -> list[str]:
    """Warnings that a method did not pass the checks for this kind of model, a line each."""
    passed = PASSED.get(model_name)
    if passed is None:
        return [f"warning: no method was checked for {model_name}: look at the maps with doubt"]
    if not passed:
        return [
            f"warning: no method passed all checks for {model_name} (docs/explanations.md): its "
            "maps may not show what the answer depended on"
        ]
    if method not in passed:
        return [
            f"warning: {method} did not pass all checks for {model_name} (docs/explanations.md), "
            f"but {' and '.join(passed)} did"
        ]
    return []


def require_method(model: nn.Module, method: Method) -> None:
    """Check that a method is defined for a model.

    Raises:
        UserError: it is not; the message names methods that are.
    """
    if method == "rollout" and not isinstance(model, ViViT | TimeSformer):
        raise UserError(
            f"rollout is not defined for {type(model).__name__}: it needs attention between whole "
            "frames or clips, as vivit and timesformer have it (not windows, pooled tokens or "
            "convolutions): choose --method gradcam++, occlusion or integrated-gradients"
        )
    if method == "gradcam++":
        last_layers(model)


def explain(
    model: nn.Module,
    clips: torch.Tensor,
    targets: torch.Tensor,
    method: Method,
    against: torch.Tensor | None = None,
    reference: Reference = "still",
) -> Relevance:
    """The relevance of frames and of their parts for the logit of a class.

    Args:
        model: in eval mode; prepared for inference in fp32, or not.
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1], on the model's device.
        targets: `(B,)` the class of each clip that is explained.
        against: `(B,)` a class to compare with; what is explained is then the difference of the
            two logits: why this class and not that one.
        reference: what occlusion (in space) and integrated gradients compare the clip with. What
            stands still in all frames has relevance only with `blurred`.

    Raises:
        UserError: the method is not defined for the model, or has no answer for a class.
    """
    require_method(model, method)
    if method == "rollout":
        if against is not None:
            raise UserError(
                "rollout is the same for all classes and compares none: choose --method "
                "gradcam++, occlusion or integrated-gradients"
            )
        return rollout(model, clips)
    if method == "gradcam++":
        return gradcam_plus_plus(model, clips, class_score(targets, against))
    explain_clip = occlusion if method == "occlusion" else integrated_gradients
    others = [None] * len(clips) if against is None else against[:, None]
    parts = [
        explain_clip(model, clip, class_score(target, other), reference)
        for clip, target, other in zip(clips, targets[:, None], others, strict=True)
    ]
    return Relevance(
        torch.cat([part.maps for part in parts]), torch.cat([part.frames for part in parts])
    )


def explain_frames(
    model: nn.Module,
    clips: torch.Tensor,
    targets: torch.Tensor,
    method: Method,
    against: torch.Tensor | None = None,
) -> torch.Tensor:
    """The relevance of the frames alone, `(B, T)` float32 on the CPU: that of `explain`, which
    occlusion spends most of its time on the parts of the picture for.

    Args:
        model, clips, targets, method, against: see `explain`.

    Raises:
        UserError: see `explain`.
    """
    if method != "occlusion":
        return explain(model, clips, targets, method, against).frames
    others = [None] * len(clips) if against is None else against[:, None]
    frames = [
        temporal_occlusion(model, clip, class_score(target, other))
        for clip, target, other in zip(clips, targets[:, None], others, strict=True)
    ]
    return torch.stack(frames)


def class_score(targets: torch.Tensor, against: torch.Tensor | None = None) -> Score:
    """The logits of classes, minus those of others if there are any.

    A class is not compared with itself: where both are the same, the logit alone is the score.

    Args:
        targets, against: `(B,)`, or `(1,)` for one class in all rows.
    """

    def of_class(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, classes.to(logits.device).expand(len(logits))[:, None])[:, 0]

    if against is None:
        return lambda logits: of_class(logits, targets)
    others = targets != against
    return lambda logits: (
        of_class(logits, targets)
        - of_class(logits, against) * others.to(logits).expand(len(logits))
    )
