"""int8: static post-training quantisation by NNCF, its calibration clips, and what it costs.

Weights get one scale per output channel, activations one scale per tensor, chosen on clips of
training patients (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877; NNCF's documentation).
"""

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clips.manifest import ClipRow
from clips.splits import patient_overlap
from evaluation.bootstrap import Interval, format_interval, paired_difference
from evaluation.predictions import Predictions
from modeling.engines import openvino_core
from utils.errors import UserError, require_package

if TYPE_CHECKING:
    import openvino

CALIBRATION_CLIPS = 128
MAX_LOSS = 0.01
"""of macro-F1 that int8 may lose on the validation clips"""

TOKEN_MODELS = ("vivit", "timesformer", "video_swin", "mvit")

COUNTED = {"memory_0", "memory_1"}
"""inputs of a network of one frame, see deployment/step.py"""

_VNNI = {"avx512_vnni", "avx_vnni", "avxvnni", "amx_int8"}


def quantize(
    model: "openvino.Model",
    samples: Iterable[np.ndarray | dict[str, np.ndarray]],
    transformer: bool,
    vnni: bool,
) -> "openvino.Model":
    """A model whose convolutions and matrix products compute in int8.

    Args:
        model: of `deployment.graph.to_openvino`; it is left as it is.
        samples: for the scales of the activations: clips `(1, T, C, H, W)`, uint8, or, for a
            network of one frame, its inputs by their names.
        transformer: whether the model is one of `TOKEN_MODELS`, whose attention NNCF treats apart.
        vnni: whether the CPU that will run it sums products of int8 in 32 bits. Older ones (AVX2,
            AVX-512) sum pairs in 16 bits, which can overflow: weights then use 7 bits.

    Raises:
        UserError: NNCF is not installed.
    """
    require_package("nncf", "--int8")
    openvino_core()
    with _quiet():
        import nncf

        fix = nncf.OverflowFix.DISABLE if vnni else nncf.OverflowFix.ENABLE
        samples = list(samples)
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(samples),
            subset_size=len(samples),
            preset=nncf.QuantizationPreset.MIXED if transformer else None,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=_of_counter(model), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )


def _of_counter(model: "openvino.Model") -> list[str]:
    """The operators that depend on the first two memories of a network of one frame: the number of
    frames seen, which must stay exact, and the vectors of the last T frames. They cost little."""
    names: dict[str, None] = {}
    waiting = [port.get_node() for port in model.inputs if port.names & COUNTED]
    while waiting:
        node = waiting.pop()
        for output in node.outputs():
            for port in output.get_target_inputs():
                user = port.get_node()
                if user.get_friendly_name() not in names and user.get_type_name() != "Result":
                    names[user.get_friendly_name()] = None
                    waiting.append(user)
    return list(names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress bars, and a line of torch about CUDA that it provokes."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 without overflow; False where the system does not tell."""
    with contextlib.suppress(OSError):
        return bool(_VNNI & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()))
    return False


def calibration_rows(splits: dict[str, Sequence[ClipRow]], count: int) -> list[ClipRow]:
    """Training clips, spread evenly over the patients and their classes.

    Args:
        splits: `train`, `val` and `test`.

    Raises:
        UserError: there is none, or patients of the training are in another split, whose scores
            would then be those of a model that has seen them once more.
    """
    train = splits["train"]
    if not train:
        raise UserError("--int8: the run has no training clips to calibrate on")
    for name in ("val", "test"):
        shared = patient_overlap({"train": train, name: splits[name]})
        if any(warning["kind"] == "leakage" for warning in shared):
            raise UserError(
                f"--int8: patients of the training are in {name} as well: split by patient "
                "(python prepare_data.py split), or export without --int8"
            )
    groups: dict[tuple[str, int], list[ClipRow]] = defaultdict(list)
    for row in train:
        groups[row.patient or "", row.label].append(row)
    chosen: list[ClipRow] = []
    while len(chosen) < min(count, len(train)):  # one of every patient and class in turn
        chosen += [rows.pop(0) for rows in groups.values() if rows]
    step = len(chosen) / min(count, len(chosen))
    return [chosen[int(i * step)] for i in range(min(count, len(chosen)))]


class Cost(NamedTuple):
    """What int8 costs on the same clips."""

    clips: int
    patients: int
    agreement: float
    """fraction of the clips that get the same class"""
    before: float
    after: float
    """macro-F1 in fp32 and in int8"""
    interval: Interval
    """95 % of `difference`, over patients; None where they are not known or too few"""

    @property
    def difference(self) -> float:
        """Macro-F1 in int8 minus that in fp32."""
        return self.after - self.before

    @property
    def acceptable(self) -> bool:
        """Whether no more than a point is lost."""
        return self.difference >= -MAX_LOSS

    def describe(self) -> str:
        """In one or two lines."""
        text = (
            f"int8 on {self.clips} validation clips of {self.patients or 'unknown'} patients: the "
            f"same class as in fp32 for {self.agreement:.1%}; macro-F1 {self.after:.4f}, in fp32 "
            f"{self.before:.4f}, difference {self.difference:+.4f}"
        )
        if not self.interval:
            return f"{text} (no interval: the patients are unknown or too few)"
        text += f" (95 % interval {format_interval(self.interval, '+.4f')})"
        if self.interval[0] < -MAX_LOSS:
            text += f"\nso few clips cannot exclude a loss of {-self.interval[0]:.3f}"
        return text


def measure_cost(fp32: Predictions, int8: Predictions) -> Cost:
    """What int8 costs, from the predictions for the same clips."""
    patients = fp32.groups("patient")
    difference = paired_difference(fp32.labels, int8.probabilities, fp32.probabilities, patients)
    known = {patient for patient in patients if patient is not None}
    return Cost(
        len(fp32),
        len(known),
        float((fp32.y_pred == int8.y_pred).mean()),
        fp32.scores["macro_f1"],
        int8.scores["macro_f1"],
        difference["macro_f1"] if known else None,
    )
