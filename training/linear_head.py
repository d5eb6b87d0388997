"""A linear head that is fitted to its optimum: a logistic regression on frozen features.

With frozen features the loss of a linear head with weight decay is convex: there is one optimum,
which needs no epochs, no learning rate and no luck. What remains to be chosen, the strength of the
regularisation, is chosen by cross-validation over the patients of the training and validation clips
together (inner folds), and the head is then fitted to all of these clips. Temperature, threshold
and novelty come from the predictions of the inner folds, so no clip is lost to validation.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import save_checkpoint
from clips.manifest import ClipRow
from clips.stratified_groups import stratified_group_split
from config import TrainConfig
from evaluation.calibration import calibrate
from evaluation.novelty import NoveltyReference, class_means, distance_to_means
from evaluation.predictions import Predictions
from modeling.features import last_layer
from training.engine import evaluate
from training.log import unreadable_line, write_history
from training.losses import class_weights
from training.state import TrainState
from utils import distributed
from utils.errors import UserError
from utils.interrupt import Interrupt
from video.clip_reader import FrameSampler, effective_fps

log = logging.getLogger(__name__)

STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-10, 3))
"""scikit-learn's C, 1e-5 to 10: the smaller, the more the weights are pulled towards zero"""

INNER_FOLDS = 5

# Features whose deviation is less than this fraction of the mean one count as constant: scaled to
# deviation 1 they would be rounding errors.
_CONSTANT = 1e-3


@dataclass(frozen=True)
class LinearHead:
    """`logits = weight @ ((features - mean) / deviation) + bias`."""

    mean: np.ndarray
    """`(F,)`"""
    deviation: np.ndarray
    """`(F,)`"""
    weight: np.ndarray
    """`(num_classes, F)`"""
    bias: np.ndarray
    """`(num_classes,)`; -infinity for a class without clips"""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """`(N, F)` to `(N, num_classes)`."""
        from scipy.special import softmax

        standardised = (features - self.mean) / self.deviation
        return softmax(standardised @ self.weight.T + self.bias, axis=1)

    def write_into(self, model: nn.Module) -> None:
        """Give a model this head, its standardisation included."""
        layer, standardise = last_layer(model), getattr(model, "standardise", None)
        mean, deviation = self.mean, self.deviation
        if standardise is not None:  # it comes before the layer
            variance = deviation**2
            standardise.set_statistics(torch.from_numpy(mean), torch.from_numpy(variance))
            mean, deviation = 0 * mean, deviation / np.sqrt(variance + standardise.eps)
        weight = self.weight / deviation
        bias = self.bias - weight @ mean
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))


def fit_heads(
    features: np.ndarray,
    labels: np.ndarray,
    importance: np.ndarray,
    strengths: Sequence[float],
    num_classes: int,
) -> list[LinearHead]:
    """The multinomial logistic regressions of the standardised features, one per strength.

    Each minimises `|weight|^2 / 2 + C sum_i importance_i loss_i`, as scikit-learn's
    LogisticRegression; with two classes, which it gives one vector of weights, each class gets half
    of it.

    Args:
        features: `(N, F)`.
        labels: `(N,)`; at least two classes occur.
        importance: `(N,)` weights of the clips.
        strengths: C, ascending.
    """
    from sklearn.linear_model import LogisticRegression

    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation <= _CONSTANT * deviation.mean()] = 1.0
    inputs = (features - mean) / deviation
    # The optimal weights are sums of the clips' features. With fewer clips than features, the same
    # problem is solved in the coordinates of an orthonormal basis of these sums.
    basis = None
    if len(inputs) < inputs.shape[1]:
        squares, scaled = np.linalg.eigh(inputs @ inputs.T)
        kept = squares > 1e-13 * squares[-1]
        lengths, scaled = np.sqrt(squares[kept]), scaled[:, kept]
        basis = (scaled / lengths).T @ inputs  # (rank, F), orthonormal rows
        inputs = scaled * lengths  # (N, rank)
    regression = LogisticRegression(solver="newton-cg", max_iter=1000, tol=1e-7, warm_start=True)
    heads = []
    for strength in strengths:
        regression.C = strength
        regression.fit(inputs, labels, sample_weight=importance)
        weight = regression.coef_ if basis is None else regression.coef_ @ basis
        bias = regression.intercept_
        if len(regression.classes_) == 2:
            weight, bias = np.vstack([-weight / 2, weight / 2]), np.append(-bias / 2, bias / 2)
        all_weights = np.zeros((num_classes, features.shape[1]))
        all_biases = np.full(num_classes, -np.inf)
        all_weights[regression.classes_], all_biases[regression.classes_] = weight, bias
        heads.append(LinearHead(mean, deviation, all_weights, all_biases))
    return heads


def clip_importance(labels: np.ndarray, num_classes: int, config: TrainConfig) -> np.ndarray:
    """The weights of clips `(N,)`, with mean 1, for the class balance that a config asks for.

    `sampler_tau` means the same as for the sampler: weight count^-tau; `class_weights` multiply it.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.maximum(counts, 1) ** -float(config.sampler_tau)
    if config.class_weights != "none":
        kind, beta = config.class_weights, config.class_balanced_beta
        weights = weights * class_weights(np.maximum(counts, 1), kind, beta).numpy()
    importance = weights[labels]
    return importance / importance.mean()


def inner_folds(rows: Sequence[ClipRow], seed: int) -> np.ndarray:
    """The inner fold of each clip, `(N,)`: no patient is in two of them.

    Where patients are unknown, or no class has clips of two of them, the source videos are not
    divided, or else the clips, and the log says so.

    Raises:
        UserError: there are fewer than two clips of each class.
    """
    labels = np.array([row.label for row in rows])
    for kind in ("patient", "video", "path"):
        groups = [getattr(row, kind) for row in rows]
        folds = min(INNER_FOLDS, len(set(groups)))
        if None in groups or folds < 2:
            continue
        fractions = dict.fromkeys(range(folds), 1 / folds)
        divided = stratified_group_split(
            labels.astype(str), np.array(groups, str), fractions, seed
        ).astype(int)
        if any(len(set(divided[labels == label])) > 1 for label in set(labels)):
            if kind != "patient":
                log.info(
                    "the inner folds may divide patients, because no class has clips of two known "
                    "ones: the strength and the calibration are those for patients seen before"
                )
            return divided
    raise UserError("head linear: no class has two clips: too few to train on")


@dataclass(frozen=True)
class FittedHead:
    """A head of the chosen strength, and what the inner folds say about it."""

    head: LinearHead
    strength: float
    """C"""
    probabilities: np.ndarray
    """`(N, num_classes)` of each clip, by a head of the same strength that has not seen its
    patient"""
    judged: np.ndarray
    """`(N,)` bool: False for clips of a class that has no clip outside their fold, about which the
    inner folds can say nothing"""


def choose_and_fit(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    config: TrainConfig,
    num_classes: int,
    interrupt: Interrupt | None = None,
) -> FittedHead:
    """Choose the strength with the lowest loss in the inner folds, and fit all clips with it.

    The loss is the mean negative log-likelihood over the judged clips, weighted by
    `clip_importance`, as the fit is.

    Args:
        features: `(N, F)`.
        labels, folds: `(N,)`; see `inner_folds`.

    Raises:
        Interrupted: `interrupt` was asked to stop.
    """
    probabilities = np.zeros((len(STRENGTHS), len(labels), num_classes))
    judged = np.zeros(len(labels), bool)
    for fold in np.unique(folds):
        held_out = folds == fold
        others = labels[~held_out]
        if len(np.unique(others)) < 2:
            continue  # nothing to tell apart
        importance = clip_importance(others, num_classes, config)
        heads = fit_heads(features[~held_out], others, importance, STRENGTHS, num_classes)
        for index, head in enumerate(heads):
            probabilities[index, held_out] = head.probabilities(features[held_out])
        judged[held_out] = np.isin(labels[held_out], others)
        if interrupt:
            interrupt.check()
    importance = clip_importance(labels, num_classes, config)
    true = probabilities[:, np.arange(len(labels)), labels][:, judged]
    losses = -np.log(np.maximum(true, 1e-12)) @ importance[judged]  # (strengths,)
    best = int(losses.argmin())
    head = fit_heads(features, labels, importance, STRENGTHS[: best + 1], num_classes)[-1]
    return FittedHead(head, STRENGTHS[best], probabilities[best], judged)


def train_linear_head(
    state: TrainState,
    loader: DataLoader,
    device: torch.device,
    folder: Path,
    interrupt: Interrupt | None = None,
) -> None:
    """Fit the model's head to a loader's clips, and write it with its calibration into best.pt.

    Args:
        loader: of the training and validation clips, or of their frozen features.

    Raises:
        Interrupted: before the end.
        UserError: the head cannot be fitted to these clips.
    """
    start = time.perf_counter()
    config, model, num_classes = state.config, state.model, len(state.config.classes)
    standardise = getattr(model, "standardise", None)
    if standardise is not None:  # for now it is to change nothing
        standardise.set_statistics(torch.tensor(0.0), torch.tensor(1 - standardise.eps))
    seen = evaluate(
        model, loader, device, description="features of the training", skip_unreadable=True,
        interrupt=interrupt, with_features=True,
    )  # fmt: skip
    state.progress.unreadable = set(seen.unreadable)
    log.info(f"features of {len(seen)} clips: {time.perf_counter() - start:.1f} s")
    features, labels = seen.features.astype(np.float64), seen.labels
    if missing := [c for i, c in enumerate(config.classes) if i not in labels]:
        raise UserError(f"none of the training clips of {', '.join(missing)} can be read")
    folds = inner_folds(seen.rows, config.seed)
    fitted = choose_and_fit(features, labels, folds, config, num_classes, interrupt)
    fitted.head.write_into(model)

    rows = [row for row, judged in zip(seen.rows, fitted.judged, strict=True) if judged]
    out_of_fold = Predictions(rows, fitted.probabilities[fitted.judged])
    trained = Predictions(seen.rows, fitted.head.probabilities(features))
    scores = out_of_fold.summary()
    state.progress.epoch = 1
    state.best = {
        "epoch": 1,
        "train_loss": trained.loss,
        "train_accuracy": trained.scores["accuracy"],
        "val_loss": scores["loss"],
        "val_accuracy": scores["accuracy"],
        "val_balanced_accuracy": scores["balanced_accuracy"],
        "val_macro_f1": scores["macro_f1"],
        "strength": fitted.strength,
        "seconds": round(time.perf_counter() - start, 2),
    }
    state.history = [state.best]
    calibration = calibrate(out_of_fold.labels, out_of_fold.probabilities, config.target_error)
    inputs = torch.from_numpy(features)  # of the last layer
    if standardise is not None:
        inputs = standardise.eval()(inputs.float().to(device)).cpu().double()
    distances = [
        distance_to_means(
            inputs[folds == fold],
            class_means(inputs[folds != fold], torch.from_numpy(labels[folds != fold])),
        )
        for fold in np.unique(folds)
    ]
    means = class_means(inputs, torch.from_numpy(labels))
    if distributed.rank() == 0:
        write_history(folder / "metrics.csv", state.history)
        paths, fps = zip(*((row.path, row.fps) for row in loader.dataset.rows), strict=True)
        sampler = FrameSampler(config.n_frames, config.eval_sampling)
        best = {
            **state.model_state_dict(),
            "calibration": calibration.state_dict(),
            "novelty": NoveltyReference(means, tuple(torch.cat(distances).tolist())).state_dict(),
            "frame_rate": effective_fps(paths, sampler, known=fps),
        }
        save_checkpoint(folder / "best.pt", best)
    distributed.broadcast_object()  # the other processes wait until it is written
    log.info(
        f"logistic regression on {len(labels)} clips, strength C = {fitted.strength:g} of "
        f"{len(set(folds))} inner folds: out-of-fold loss {scores['loss']:.4f} accuracy "
        f"{scores['accuracy']:.3f} macro-F1 {scores['macro_f1']:.3f}  {state.best['seconds']} s"
    )
    if seen.unreadable:
        log.warning(unreadable_line(seen.unreadable))
