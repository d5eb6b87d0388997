"""The loss of each clip, with corrections for classes of unequal size.

All losses take the logits z `(N, K)` of a linear head and the number of training clips of each
class, n `(K,)`, from the manifest. They differ in what they do before the softmax p:

- `cross_entropy`: -log p_y.
- `focal`: -(1 - p_y)^gamma log p_y, so that clips that are classified well already count little.
  Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, equation 4 with
  a softmax for the sigmoid; with `class_weights` as its alpha, equation 5.
- `ldam`: the cross entropy after the logit of the clip's own class was lowered by a margin, largest
  for the rarest class: proportional to n^(-1/4). Cao et al., "Learning Imbalanced Datasets with
  Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv:1906.07413, sections 3.2 and 3.3 (DRW).
  The paper's margins are in cosines of normalised features and weights, scaled by s = 30 together.
  Our heads are linear: their logits have no such bound and learn their scale themselves, so s is 1
  and the margins, at most 0.5, are in logits. This is a weaker demand than the paper's: the odds
  of the rarest class must be higher by a factor of e^0.5. `class_weights` are deferred, see
  `Criterion`.
- `balanced_softmax`: the cross entropy of z + log n. Ren et al., "Balanced Meta-Softmax for
  Long-Tailed Visual Recognition", NeurIPS 2020, arXiv:2007.10740, equation 3.
- `logit_adjustment`: the cross entropy of z + tau log(n / sum n), tau being `logit_adjust_tau`;
  with tau = 1 the same as balanced softmax. Menon et al., "Long-tail learning via logit
  adjustment", ICLR 2021, arXiv:2007.07314, equation 10.

`label_smoothing` smooths the target. It means the same in the last two losses as in
`cross_entropy`: the smoothed target is compared with the softmax of the shifted logits, which
models the class frequencies of training. `focal` and `ldam` are defined for one true class and do
not use it.

Validation and test are scored by the plain softmax of z whatever loss was used in training. After
the last two losses that is a posterior for classes of equal size, so the validation loss is no
measure of fit where the classes are not of equal size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from config import TrainConfig
from utils.errors import ResultWarning, UserError

LARGEST_MARGIN = 0.5  # of LDAM, as in the authors' code

_FOR_RARE_CLASSES = ("ldam", "balanced_softmax", "logit_adjustment")


class Criterion:
    """The loss of each clip of a batch, as a config describes it.

    With `class_weights` the loss of a clip is multiplied by the weight of its class, also with
    smoothed targets. The weights have mean 1 over the classes, so over the clips of an uneven split
    they have a smaller mean: the gradient stays the mean over clips (training/engine.py) and is not
    divided by the sum of the weights. With `ldam` the weights begin in the last fifth of the epochs
    (rounded up), as the paper defers them: `class_weights` inverse are those of its algorithm 1,
    effective those of its code.

    Args:
        class_counts: `(K,)` training clips of each class, each at least 1; plain cross entropy
            needs none.
    """

    def __init__(
        self,
        config: TrainConfig,
        class_counts: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        weighted = config.class_weights != "none"
        if not class_counts and (weighted or config.loss in _FOR_RARE_CLASSES):
            raise ValueError(
                f"{config.loss} with weights {config.class_weights} needs class counts"
            )
        self.loss = LOSSES[config.loss](config, class_counts, device)
        self.weights = None
        if weighted:
            kind, beta = config.class_weights, config.class_balanced_beta
            self.weights = class_weights(class_counts, kind, beta).float().to(device)
        # A fifth in whole numbers: 0.8 * epochs may round to either side.
        self.weighted_from = config.epochs * 4 // 5 if config.loss == "ldam" else 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """fp32 logits `(N, K)` and labels `(N,)` to losses `(N,)`, after `epoch` whole epochs."""
        losses = self.loss(logits, labels)
        if self.weights is not None and epoch >= self.weighted_from:
            losses = losses * self.weights[labels]
        return losses


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""fp32 logits `(N, K)` and labels `(N,)` to losses `(N,)`"""

Device = torch.device | str


def _cross_entropy(config: TrainConfig, class_counts: Sequence[int], device: Device) -> Loss:
    smoothing = config.label_smoothing
    return partial(F.cross_entropy, reduction="none", label_smoothing=smoothing)


def _focal(config: TrainConfig, class_counts: Sequence[int], device: Device) -> Loss:
    return partial(focal_loss, gamma=config.focal_gamma)


def _ldam(config: TrainConfig, class_counts: Sequence[int], device: Device) -> Loss:
    return partial(ldam_loss, margins=ldam_margins(class_counts).float().to(device))


def _adjusted(config: TrainConfig, class_counts: Sequence[int], device: Device) -> Loss:
    tau = 1.0 if config.loss == "balanced_softmax" else config.logit_adjust_tau
    prior = log_prior(class_counts, tau).float().to(device)
    loss = _cross_entropy(config, class_counts, device)
    return lambda logits, labels: loss(logits + prior, labels)


LOSSES: dict[str, Callable[[TrainConfig, Sequence[int], Device], Loss]] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "ldam": _ldam,
    "balanced_softmax": _adjusted,
    "logit_adjustment": _adjusted,
}
"""What makes each loss from the settings, the number of training clips of each class and the
device. An entry is all that an own loss needs (docs/extending.md)."""


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p)^gamma log p for the probabilities p of the labels, `(N, K)` and `(N,)` to `(N,)`."""
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    # With gamma < 1 the slope of the power at zero is infinite, and the gradient would be NaN.
    error = (1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(error**gamma) * log_p


def ldam_loss(logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Cross entropy after the logit of each label was lowered by its margin, to `(N,)`."""
    lowered = logits - margins * F.one_hot(labels, len(margins))
    return F.cross_entropy(lowered, labels, reduction="none")


def ldam_margins(class_counts: Sequence[int]) -> torch.Tensor:
    """The margins, `(K,)` fp64: proportional to n^(-1/4), LARGEST_MARGIN for the rarest class."""
    margins = torch.tensor(class_counts, dtype=torch.float64) ** -0.25
    return margins * LARGEST_MARGIN / margins.max()


def class_weights(class_counts: Sequence[int], kind: str, beta: float = 0.999) -> torch.Tensor:
    """The weights of the classes, `(K,)` fp64, with mean 1.

    Args:
        kind: `inverse`: proportional to 1 / n. `effective`: to the inverse effective number of
            samples, (1 - beta) / (1 - beta^n); from equal weights (beta = 0) to `inverse`
            (beta -> 1). Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
            CVPR 2019, arXiv:1901.05555, section 4, whose normalisation this is too.
    """
    n = torch.tensor(class_counts, dtype=torch.float64)
    weights = 1 / n if kind == "inverse" else (1 - beta) / (1 - beta**n)
    return weights / weights.mean()


def log_prior(class_counts: Sequence[int], tau: float) -> torch.Tensor:
    """tau log(n / sum n), `(K,)` fp64."""
    n = torch.tensor(class_counts, dtype=torch.float64)
    return tau * (n / n.sum()).log()


def logit_adjustment(state: dict[str, Any], tau: float, checkpoint: str) -> torch.Tensor | float:
    """What to subtract from the logits of a trained model, `(K,)` fp64, or 0 if tau is 0.

    Menon et al., equation 9. It is subtracted before the logits are divided by the temperature T,
    so that the predicted class of a clip with one view is that of the paper, whatever T is. With
    calibrated probabilities, the softmax of z / T, Bayes' rule for classes of equal size is
    z / T - log(n / sum n), which is tau = T here: tau is 1 only if the model needs no temperature.
    T and the threshold of `uncertain` were fitted on validation clips without this adjustment and
    stay as they are, so neither is guaranteed to hold with it.

    Args:
        state: the checkpoint, and `checkpoint` its name for the error message.

    Raises:
        UserError: the checkpoint is of a version that did not store its `class_counts`.
    """
    if not tau:
        return 0.0
    if not state.get("class_counts"):
        raise UserError(
            f"{checkpoint}: does not say how many training clips each class has (an earlier "
            "version wrote it): leave --logit-adjust-tau out, or run train.py --resume on its run "
            "folder once"
        )
    return log_prior(state["class_counts"], tau)


def warn_double_balancing(config: TrainConfig) -> list[ResultWarning]:
    """A warning if a training run corrects for rare classes more than once."""
    corrections = _corrections(config)
    if config.sampler_tau and corrections:
        text = (
            "rare classes are corrected for twice: their clips are drawn more often (sampler_tau = "
            f"{config.sampler_tau:g}) and the loss favours them ({' and '.join(corrections)}); to "
            "do it once, give --sampler-tau 0"
        )
        return [{"kind": "class balance", "text": text}]
    # LDAM is meant to be weighted.
    if len(corrections) == 2 and config.loss != "ldam":
        text = (
            f"rare classes are corrected for twice, by {' and '.join(corrections)}: to do it once, "
            "leave --class-weights out"
        )
        return [{"kind": "class balance", "text": text}]
    return []


def warn_double_adjustment(config: TrainConfig, tau: float) -> list[ResultWarning]:
    """A warning if both `evaluate.py --logit-adjust-tau` and the training favour rare classes.

    A model whose clips were drawn with weight n^-sampler_tau has learnt n^(1 - sampler_tau) as the
    sizes of the classes, so that only an adjustment by 1 - sampler_tau remains to be made.
    """
    corrections = _corrections(config)
    left = 0.0 if corrections else max(0.0, 1 - config.sampler_tau)
    if tau <= left + 1e-9 or not (corrections or config.sampler_tau):
        return []
    if config.sampler_tau:
        corrections = [f"sampler_tau = {config.sampler_tau:g}", *corrections]
    remedy = f"give --logit-adjust-tau {left:g}" if left else "leave --logit-adjust-tau out"
    text = (
        f"--logit-adjust-tau {tau:g} corrects for rare classes, as the training did already "
        f"({' and '.join(corrections)}): {remedy}, or use it on a run with --sampler-tau 0 and "
        "plain cross_entropy"
    )
    return [{"kind": "class balance", "text": text}]


def _corrections(config: TrainConfig) -> list[str]:
    """The settings of the loss that favour rare classes."""
    settings = []
    if config.loss in _FOR_RARE_CLASSES:
        settings.append(f"loss = {config.loss}")
    if config.class_weights != "none":
        settings.append(f"class_weights = {config.class_weights}")
    return settings
