"""The texts and tables of a report; report_figures.py makes the charts."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.bootstrap import Interval
from web.anonymize import Pseudonyms
from web.report_data import ReportData, numeric_columns
from web.svg_charts import Whisker, percent_axis
from web.templating import decimals, interval_text, percent

# Title of each headline number, and a sentence that begins with its value.
_HEADLINES = {
    "accuracy": ("Accuracy", "of the clips are classified correctly."),
    "balanced_accuracy": (
        "Balanced accuracy",
        "mean recall of the classes: rare classes count as much as frequent ones.",
    ),
    "macro_f1": (
        "Macro-F1",
        "mean F1 of the classes; missed actions and false alarms both lower it. 1 is perfect.",
    ),
    "ece": (
        "Calibration error (ECE)",
        "mean difference between confidence and accuracy. 0 is perfect.",
    ),
    "coverage": ("Coverage", "of the clips are answered; the others are called “uncertain”."),
    "error": ("Error among answered clips", "of the answered clips are classified wrongly."),
}

_COLUMNS = {"macro_f1": "macro-F1", "ece": "ECE", "brier": "Brier", "nll": "NLL"}

_WARNING_TITLES = {"leakage": "Leakage", "class balance": "Class balance"}


def title(data: ReportData) -> str:
    """The title of the page: the model and the split."""
    model = data.run.config.model_name if data.run.config else "Model"
    if data.results.get("folds") or data.folds:
        return f"{model}: results {data.split}"
    split = {"val": "validation", "train": "training"}.get(data.split, data.split)
    return f"{model}: results on the {split} clips"


def warnings(data: ReportData, names: Pseudonyms) -> list[tuple[str, str]]:
    """Title and text of each thing that a reader must know before believing a number."""
    results, notes = data.results, []
    if missing := results.get("unreadable_clips"):
        total = missing + results["clips"]
        text = f"{missing} of {total} clips could not be read and are in none of the numbers below."
        notes.append(("Missing clips", text))
    for warning in results["warnings"]:
        heading = _WARNING_TITLES.get(warning["kind"], "Warning")
        notes.append((heading, names.redact(warning["text"])))
    # With --csv, the split is the name of another manifest.
    if data.split in ("train", "val") and not results.get("csv"):
        use = "trained" if data.split == "train" else "chosen and calibrated"
        text = f"The model was {use} on these clips. On new clips its results will be worse."
        notes.append(("Not a test", text))
    if results.get("shuffle_frames"):
        text = "The frames of each clip were shuffled in time, to measure what motion contributes."
        notes.append(("Shuffled frames", text))
    if tau := results.get("logit_adjust_tau"):
        text = (
            f"The logits were adjusted by {tau:g} times the log of the class frequencies in "
            "training."
        )
        notes.append(("Adjusted logits", text))
    return notes


def interval_note(data: ReportData) -> str:
    """How far the intervals can be trusted."""
    patients, unknown = data.results["patients"], data.results["clips_of_unknown_patient"]
    if not patients:
        return (
            "No patient is known for any clip, so there is no interval over patients. Clips of "
            "one patient resemble each other, and intervals that ignore this are too narrow; only "
            "such intervals are shown, in small print. To get better ones, add a column “patient” "
            "to the manifest."
        )
    if patients == 1 and not unknown:
        return (
            "All clips come from one patient, so there is no interval over patients: one patient "
            "does not show how patients differ. Nothing here tells how well the model does on "
            "other patients."
        )
    note = (
        "The interval to quote resamples whole patients, because clips of one patient resemble "
        "each other. The interval in small print treats all clips as independent and is usually "
        "too narrow."
    )
    if unknown:
        note += (
            f" {unknown} clips of unknown patients count as one patient each, so the interval is "
            "still too narrow."
        )
    if patients < 10:
        note += f" With only {patients} patients, even the first interval is rough."
    if data.results["accuracy"] == 1:
        note += (
            " No clip was classified wrongly, so the intervals have no width; this does not prove "
            "that the model makes no mistakes."
        )
    return note


def headline_cards(
    data: ReportData, more_intervals: Mapping[str, Mapping[str, Interval]]
) -> list[dict[str, Any]]:
    """The headline numbers with both intervals."""
    results = data.results
    values = {**results, **results["selective"], "ece": results["calibration"]["ece"]}
    intervals = {**results["intervals"], **more_intervals}
    return [_card(data, name, values[name], intervals[name]) for name in _HEADLINES]


def _card(
    data: ReportData, name: str, value: float | None, intervals: Mapping[str, Interval]
) -> dict[str, Any]:
    heading, meaning = _HEADLINES[name]
    in_percent = name not in ("macro_f1", "ece")
    wide = intervals.get("patients") if data.results["patients"] else None
    naive = intervals.get("clips")
    value_text = percent(value) if in_percent else decimals(value)
    wide_text = interval_text(wide, in_percent)
    high = 1.0
    if name in ("ece", "error"):  # small numbers get a scale of their own
        high = percent_axis("", max([value or 0, *(wide or ()), *(naive or ())])).high
    baseline = data.results["majority_baseline"] if name == "accuracy" else None
    ends = ("0", percent(high, 0) if in_percent else f"{high:g}")
    label = f"{heading} {value_text}, "
    label += f"95 % interval {wide_text}" if wide_text else "no interval"
    whisker = Whisker(label, value or 0, high, ends, wide, naive, baseline)
    return {
        "title": heading,
        "value": value_text,
        "meaning": meaning,
        "wide": wide_text,
        "naive": interval_text(naive, in_percent),
        "whisker": None if value is None else whisker,
        "baseline": percent(baseline) if baseline is not None else "",
    }


def confusion(data: ReportData) -> list[dict[str, Any]]:
    """One row per true class: its name, its number of clips, and for each predicted class the
    count and the fraction of the row (None for a class without clips)."""
    rows = []
    for name, counts in zip(data.classes, data.predictions.confusion, strict=True):
        total = int(counts.sum())
        cells = [(int(count), count / total if total else None) for count in counts]
        rows.append({"name": name, "clips": total, "cells": cells})
    return rows


def per_class(
    data: ReportData, more_intervals: Mapping[str, Mapping[str, Interval]]
) -> list[dict[str, Any]]:
    """One row per class: its scores, and the interval of its recall over patients."""
    rows = []
    for name in data.classes:
        row = {"name": name, **data.results["per_class"][name], "interval": None}
        if row["clips"] and data.results["patients"]:
            row["interval"] = more_intervals[f"recall of {name}"]["patients"]
        rows.append(row)
    return rows


def averages(data: ReportData) -> list[dict[str, Any]]:
    """The scores averaged over clips, videos and patients, one row each."""
    rows = []
    for kind, scores in data.results["averages"].items():
        count = data.results["clips"] if kind == "clip" else scores.get("groups", 0)
        rows.append({**scores, "kind": kind, "count": count})
    return rows


def patients_left_out(data: ReportData, max_count: int) -> str:
    """Which patients the page does not show, in one sentence; empty if it shows all.

    Args:
        max_count: how many it shows, those with the lowest accuracy.
    """
    order, correct = data.predictions.numbered_patients, data.predictions.correct
    others = [
        correct[data.predictions.clips_of_patients[name]].mean() for name in order[max_count:]
    ]
    if not others:
        return ""
    return (
        f"Shown are the {max_count} patients with the lowest accuracy of {len(order):,}. The "
        f"accuracy of the other {len(others):,} is from {percent(others[0])} to "
        f"{percent(others[-1])}."
    )


def mistakes(data: ReportData, names: Pseudonyms, max_count: int) -> list[dict[str, Any]]:
    """The wrong predictions with the highest confidence."""
    predictions = data.predictions
    wrong = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    return [
        {
            "index": int(i),
            "clip": names.clips[i],
            "path": predictions.rows[i].path,
            "true": data.classes[predictions.labels[i]],
            "predicted": data.classes[predictions.y_pred[i]],
            "confidence": float(predictions.confidence[i]),
            "probability_of_true": float(predictions.probabilities[i, predictions.labels[i]]),
            "decided": bool(data.run.decided[i]),
        }
        for i in wrong[order][:max_count]
    ]


def settings(data: ReportData, names: Pseudonyms) -> dict[str, Any]:
    """The commands, versions, hardware and settings as text without identifiers."""
    keys = ("checkpoint", "epoch", "split", "views", "crops", "logit_adjust_tau", "command")
    evaluation = {key: data.results[key] for key in keys if key in data.results}
    return {
        "evaluation": _redacted(evaluation, names),
        "training": [_session(session, names) for session in data.sessions],
        "evaluations": [_session(session, names) for session in data.evaluations],
        "config": _redacted(data.settings, names),
    }


def folds(data: ReportData, names: Pseudonyms) -> dict[str, Any] | None:
    """cross_validation.csv for people: `columns`, and `rows` of a name and its cells."""
    if not data.folds:
        return None
    row_names = next(iter(data.folds.values()))
    numbers = {name: data.folds[name] for name in list(data.folds)[1:]}
    columns = numeric_columns(numbers)
    cells = [_format_column(values) for values in columns.values()]
    return {
        "columns": [_COLUMNS.get(name, name.replace("_", " ")) for name in columns],
        "rows": [
            (names.redact(name), [column[i] for column in cells])
            for i, name in enumerate(row_names)
        ],
    }


def _format_column(values: np.ndarray) -> list[str]:
    """Three decimals; none in a column of integers; empty without a value."""
    known = values[~np.isnan(values)]
    digits = 0 if (known % 1 == 0).all() else 3
    return ["" if np.isnan(value) else f"{value:.{digits}f}" for value in values]


def _session(session: Mapping[str, Any], names: Pseudonyms) -> dict[str, str]:
    texts = {name: _text(value) for name, value in session.items()}
    return {**texts, "command": names.redact_command(texts.get("command", ""))}


def _redacted(values: Mapping[str, Any], names: Pseudonyms) -> dict[str, str]:
    texts = {name: _text(value) for name, value in values.items()}
    return {
        name: names.redact_command(text) if name == "command" else names.redact(text)
        for name, text in texts.items()
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
