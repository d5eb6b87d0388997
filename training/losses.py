"""The loss of each clip, and what may be done about classes of unequal size.

All losses see a linear head's logits z `(N, K)` and the training split's clips of each class, n
`(K,)`, by its manifest. They differ in what they do before the softmax p:

- `cross_entropy`: -log p_y.
- `focal`: -(1 - p_y)^gamma log p_y, so that clips that are right already count little. Lin et al.,
  "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, equation 4 with a softmax
  for the sigmoid; with `class_weights` as its alpha, equation 5.
- `ldam`: the cross entropy after the clip's own class has lost its margin, largest for the rarest
  class: proportional to n^(-1/4). Cao et al., "Learning Imbalanced Datasets with
  Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv:1906.07413, sections 3.2 and 3.3 (DRW).
  The paper's margins are in cosines, of normalised features and weights, scaled by s = 30 together.
  Our heads are linear: their logits have no such bound and learn their scale themselves, so s is 1
  and the margins, at most 0.5, are in logits. That asks for less than the paper does: the rarest
  class must win by a factor of e^0.5 of its odds. `class_weights` are deferred, see `Criterion`.
- `balanced_softmax`: the cross entropy of z + log n. Ren et al., "Balanced Meta-Softmax for
  Long-Tailed Visual Recognition", NeurIPS 2020, arXiv:2007.10740, equation 3.
- `logit_adjustment`: the cross entropy of z + tau log(n / sum n), tau being `adjustment_tau`; with
  1 the same as the last. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
  arXiv:2007.07314, equation 10.

`label_smoothing` is of the target, and so means the same in the last two as in `cross_entropy`:
there the shifted softmax, which is over the classes as they come in training, is held against it.
`focal` and `ldam` are defined for one true class and do not use it.

Validation and test are scored by the plain softmax of z whatever the training minimised. After the
last two that is a posterior for classes of equal size: their validation loss is no measure of fit
where the classes are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from config import TrainConfig
from utils.errors import UserError

LARGEST_MARGIN = 0.5  # of LDAM, as in the authors' code

_FOR_RARE = ("ldam", "balanced_softmax", "logit_adjustment")


class Criterion:
    """The loss of each clip of a batch, as a config wants it.

    With `class_weights` a clip's loss is multiplied by its class's weight, also with smoothed
    targets. The weights' mean over the classes is 1, so over the clips of an uneven split it is
    less: the gradient stays the mean over clips (epoch.py), which the weights are not divided out
    of. With `ldam` they begin in the last fifth of the epochs (rounded up), as the paper defers
    them: `class_weights` inverse are those of its algorithm 1, effective those of its code.

    Args:
        counts: `(K,)` clips of each class in training, each at least 1; plain cross entropy needs
            none.
    """

    def __init__(
        self, config: TrainConfig, counts: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        weighted = config.class_weights != "none"
        if not counts and (weighted or config.loss in _FOR_RARE):
            raise ValueError(f"{config.loss} with weights {config.class_weights} needs counts")
        self.weights = self.margins = self.shift = None
        if weighted:
            weights = class_weights(counts, config.class_weights, config.effective_beta)
            self.weights = weights.float().to(device)
        if config.loss == "ldam":
            self.margins = ldam_margins(counts).float().to(device)
        if config.loss in ("balanced_softmax", "logit_adjustment"):
            tau = 1.0 if config.loss == "balanced_softmax" else config.adjustment_tau
            self.shift = prior_shift(counts, tau).float().to(device)
        # A fifth in whole numbers: 0.8 * epochs may round to either side.
        self.weighted_from = config.epochs * 4 // 5 if self.margins is not None else 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        """Logits `(N, K)` and labels `(N,)` to losses `(N,)`; `epoch` epochs are finished."""
        if self.config.loss == "focal":
            losses = focal_loss(logits, labels, self.config.focal_gamma)
        elif self.margins is not None:
            losses = ldam_loss(logits, labels, self.margins)
        else:
            shifted = logits if self.shift is None else logits + self.shift
            smoothing = self.config.label_smoothing
            losses = F.cross_entropy(shifted, labels, reduction="none", label_smoothing=smoothing)
        if self.weights is not None and epoch >= self.weighted_from:
            losses = losses * self.weights[labels]
        return losses


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p)^gamma log p of the labels' probabilities p, `(N, K)` and `(N,)` to `(N,)`."""
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    # With gamma < 1 the power's slope at zero is infinite: the gradient would be NaN.
    wrong = (1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(wrong**gamma) * log_p


def ldam_loss(logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Cross entropy after each label's own logit lost its margin, to `(N,)`."""
    shifted = logits - margins * F.one_hot(labels, len(margins))
    return F.cross_entropy(shifted, labels, reduction="none")


def ldam_margins(counts: Sequence[int]) -> torch.Tensor:
    """The margins, `(K,)`, fp64: proportional to n^(-1/4), the rarest class's LARGEST_MARGIN."""
    margins = torch.tensor(counts, dtype=torch.float64) ** -0.25
    return margins * LARGEST_MARGIN / margins.max()


def class_weights(counts: Sequence[int], kind: str, beta: float = 0.999) -> torch.Tensor:
    """The weights of the classes, `(K,)`, fp64, their mean 1.

    Args:
        kind: `inverse`: proportional to 1 / n. `effective`: to the inverse effective number of
            samples, (1 - beta) / (1 - beta^n); from none (beta = 0) to `inverse` (beta -> 1). Cui
            et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019,
            arXiv:1901.05555, section 4, whose normalisation this is too.
    """
    n = torch.tensor(counts, dtype=torch.float64)
    weights = 1 / n if kind == "inverse" else (1 - beta) / (1 - beta**n)
    return weights / weights.mean()


def prior_shift(counts: Sequence[int], tau: float) -> torch.Tensor:
    """tau log(n / sum n), `(K,)`, fp64."""
    n = torch.tensor(counts, dtype=torch.float64)
    return tau * (n / n.sum()).log()


def post_hoc_shift(state: dict[str, Any], tau: float, checkpoint: str) -> torch.Tensor | float:
    """What to subtract from the logits of a trained model, `(K,)`, fp64, or 0 if tau is 0.

    Menon et al., equation 9. It is taken off before the temperature T divides, so that the answer
    to a clip seen once is the paper's whatever T is. With calibrated probabilities, the softmax of
    z / T, Bayes' rule for classes of equal size is z / T - log(n / sum n), which is tau = T here:
    tau is 1 only if the model needs no temperature. T and the threshold of `uncertain` were fitted
    on validation clips without this and stay as they are: neither promises what it did.

    Args:
        state: the checkpoint, and `checkpoint` how the user called it.

    Raises:
        UserError: the checkpoint is of a version that did not store its `class_counts`.
    """
    if not tau:
        return 0.0
    if not state.get("class_counts"):
        raise UserError(
            f"{checkpoint}: does not say how many training clips each class has (an earlier "
            "version wrote it): leave --adjust out, or run train.py --resume on its run folder once"
        )
    return prior_shift(state["class_counts"], tau)


def double_correction(config: TrainConfig) -> list[str]:
    """A warning if a training makes up for small classes more than once."""
    by = _for_rare_classes(config)
    if config.tau and by:
        return [
            f"small classes are made up for twice: their clips are drawn more often (tau = "
            f"{config.tau:g}) and the loss favours them ({' and '.join(by)}); for once, give "
            "--tau 0"
        ]
    # LDAM is meant to be weighted.
    if len(by) == 2 and config.loss != "ldam":
        return [
            f"small classes are made up for twice, by {' and '.join(by)}: for once, leave "
            "--class-weights out"
        ]
    return []


def adjusted_twice(config: TrainConfig, adjust: float) -> list[str]:
    """A warning if `evaluate.py --adjust` corrects what the training corrected already.

    A model whose clips were drawn with weight n^-tau has learnt n^(1 - tau) as the classes' sizes,
    so that an `adjust` of 1 - tau is what is left.
    """
    by = _for_rare_classes(config)
    left = 0.0 if by else max(0.0, 1 - config.tau)
    if adjust <= left + 1e-9 or not (by or config.tau):
        return []
    by = [f"tau = {config.tau:g}"] * bool(config.tau) + by
    remedy = f"give --adjust {left:g}" if left else "leave --adjust out"
    return [
        f"--adjust {adjust:g} makes up for small classes, as the training did already "
        f"({' and '.join(by)}): {remedy}, or use it on a run of --tau 0 and plain cross_entropy"
    ]


def _for_rare_classes(config: TrainConfig) -> list[str]:
    """The settings of the loss that favour small classes."""
    weighted = config.class_weights != "none"
    return [f"loss = {config.loss}"] * (config.loss in _FOR_RARE) + [
        f"class_weights = {config.class_weights}"
    ] * weighted
