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

from clips.manifest import ClipRow
from clips.stratified_groups import stratified_group_split
from config import TrainConfig
from evaluation.calibration import calibrate
from evaluation.novelty import NoveltyReference, class_means, distance_to_means
from evaluation.predictions import Predictions
from modeling.features import last_layer
from training.engine import evaluate
from training.final_test import save_calibrated
from training.log import unreadable_line, write_history
from training.losses import class_weights
from training.state import TrainState
from utils import distributed
from utils.errors import ResultWarning, UserError, format_warning
from utils.interrupt import Interrupt

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


def inner_folds(rows: Sequence[ClipRow], seed: int) -> tuple[np.ndarray, str]:
    """The inner fold of each clip, `(N,)`, and what the folds do not divide.

    That is the `patient`; where no patient is known, or the folds could evaluate too few clips, the
    `video` or the single clip (`path`). A clip whose patient is unknown among known ones is kept
    together with its video.

    Raises:
        UserError: no class has two clips.
    """
    labels = np.array([row.label for row in rows])
    for kind in ("patient", "video", "path"):
        groups = [str(getattr(row, kind) or row.video or row.path) for row in rows]
        count = min(INNER_FOLDS, len(set(groups)))
        if count < 2 or not any(getattr(row, kind) for row in rows):
            continue
        fractions = dict.fromkeys(range(count), 1 / count)
        divided = stratified_group_split(labels.astype(str), np.array(groups), fractions, seed)
        folds = divided.astype(int)
        evaluated = can_be_evaluated(labels, folds)
        enough = evaluated.mean() >= 0.5 and len(set(labels[evaluated])) > 1
        if enough or (kind == "path" and evaluated.any()):
            return folds, kind
    raise UserError("head linear: no class has two clips: too few to train on")


def can_be_evaluated(labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Whether the other folds have clips of a clip's class, and of a second class, `(N,)` bool."""
    evaluated = np.zeros(len(labels), bool)
    for fold in np.unique(folds):
        others = np.unique(labels[folds != fold])
        evaluated[folds == fold] = np.isin(labels[folds == fold], others) & (len(others) > 1)
    return evaluated


@dataclass(frozen=True)
class FittedHead:
    """A head of the chosen strength, and what the inner folds say about it."""

    head: LinearHead
    strength: float
    """C"""
    probabilities: np.ndarray
    """`(N, num_classes)` of each clip, by a head of the same strength that has not seen its
    patient"""
    evaluated: np.ndarray
    """`(N,)` bool, see `can_be_evaluated`; about other clips the inner folds say nothing"""


def choose_and_fit(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    config: TrainConfig,
    num_classes: int,
    interrupt: Interrupt | None = None,
) -> FittedHead:
    """Choose the strength with the lowest loss in the inner folds, and fit all clips with it.

    The loss is the mean negative log-likelihood of the clips that can be evaluated, weighted by
    `clip_importance`, as the fit is. A class without clips in the other folds gets a probability as
    if a single clip of it had been seen, by Laplace's rule, because 0 would spoil the calibration.

    Args:
        features: `(N, F)`.
        labels, folds: `(N,)`; see `inner_folds`.

    Raises:
        Interrupted: `interrupt` was asked to stop.
    """
    probabilities = np.zeros((len(STRENGTHS), len(labels), num_classes))
    evaluated = can_be_evaluated(labels, folds)
    for fold in np.unique(folds[evaluated]):
        held_out = folds == fold
        others = labels[~held_out]
        importance = clip_importance(others, num_classes, config)
        heads = fit_heads(features[~held_out], others, importance, STRENGTHS, num_classes)
        unseen = np.setdiff1d(np.arange(num_classes), others)
        for index, head in enumerate(heads):
            predicted = head.probabilities(features[held_out])
            predicted[:, unseen] = 1 / (len(others) + num_classes)
            probabilities[index, held_out] = predicted / predicted.sum(axis=1, keepdims=True)
        if interrupt:
            interrupt.check()
    importance = clip_importance(labels, num_classes, config)
    true = probabilities[:, np.arange(len(labels)), labels][:, evaluated]
    losses = -np.log(np.maximum(true, 1e-12)) @ importance[evaluated]  # (strengths,)
    best = int(losses.argmin())
    head = fit_heads(features, labels, importance, STRENGTHS[: best + 1], num_classes)[-1]
    return FittedHead(head, STRENGTHS[best], probabilities[best], evaluated)


def train_linear_head(
    state: TrainState,
    loader: DataLoader,
    device: torch.device,
    folder: Path,
    interrupt: Interrupt | None = None,
) -> list[ResultWarning]:
    """Fit the model's head to a loader's clips, and write it with its calibration into best.pt.

    Args:
        loader: of the training and validation clips, or of their frozen features.

    Returns:
        What a reader of the results must know about the calibration.

    Raises:
        Interrupted: before the end.
        UserError: the head cannot be fitted to these clips.
    """
    start = time.perf_counter()
    config, model, num_classes = state.config, state.model, len(state.config.classes)
    standardise = getattr(model, "standardise", None)
    if standardise is not None:  # for now it is to change nothing
        standardise.set_statistics(torch.tensor(0.0), torch.tensor(1 - standardise.eps))
    description = "features of the training"
    options = {"skip_unreadable": True, "interrupt": interrupt, "with_features": True}
    seen = evaluate(model, loader, device, description=description, **options)
    state.progress.unreadable = set(seen.unreadable)
    log.info(f"features of {len(seen)} clips: {time.perf_counter() - start:.1f} s")
    features, labels = seen.features.astype(np.float64), seen.labels
    if missing := [c for i, c in enumerate(config.classes) if i not in labels]:
        raise UserError(f"none of the training clips of {', '.join(missing)} can be read")
    folds, kind = inner_folds(seen.rows, config.seed)
    fitted = choose_and_fit(features, labels, folds, config, num_classes, interrupt)
    fitted.head.write_into(model)

    evaluated = np.flatnonzero(fitted.evaluated)
    out_of_fold = Predictions([seen.rows[i] for i in evaluated], fitted.probabilities[evaluated])
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
    novelty = NoveltyReference(means, tuple(torch.cat(distances).tolist()))
    if distributed.rank() == 0:
        write_history(folder / "metrics.csv", state.history)
    best, clips = state.model_state_dict(), loader.dataset.rows
    save_calibrated(folder, best, calibration, novelty, clips, config)
    log.info(
        f"logistic regression on {len(labels)} clips, strength C = {fitted.strength:g} by "
        f"{len(set(folds))} inner folds, which evaluate {len(evaluated)} clips: "
        f"loss {scores['loss']:.4f} accuracy "
        f"{scores['accuracy']:.3f} macro-F1 {scores['macro_f1']:.3f}  {state.best['seconds']} s"
    )
    if seen.unreadable:
        log.warning(unreadable_line(seen.unreadable))
    state.save(folder)
    return _calibration_warnings(state, kind)


def _calibration_warnings(state: TrainState, kind: str) -> list[ResultWarning]:
    """Warnings if the inner folds knew more of a clip than a test does of a new patient's.

    Args:
        kind: what the folds did not divide.
    """
    warnings: list[ResultWarning] = []
    if kind != "patient":
        text = (
            "the inner folds may divide patients, who are unknown or too few: strength, "
            "temperature and threshold may suit patients of the training only"
        )
        warnings.append({"kind": "other", "text": text})
    if state.pretraining:
        text = (
            "temperature and threshold were fitted to clips that the model may have been "
            "pretrained on: for new patients its confidence may be too high"
        )
        warnings.append({"kind": "other", "text": text})
    for warning in warnings:
        log.warning(format_warning(warning))
    return warnings
