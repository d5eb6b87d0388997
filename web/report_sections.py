"""The words and tables of a report's sections; report_figures.py makes their charts."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from web.anonymize import Names
from web.report_data import Interval, Run
from web.svg_charts import Whisker, percent_axis
from web.templating import decimals, percent, span

# Of each headline number: its title, and a sentence that the value begins.
_CARDS = {
    "accuracy": ("Accuracy", "of the clips are named right."),
    "balanced_accuracy": (
        "Balanced accuracy",
        "right on average over the classes: rare ones count as much as frequent ones.",
    ),
    "macro_f1": (
        "Macro-F1",
        "mean of the classes’ F1, which missed actions and false alarms both lower. 1 is perfect.",
    ),
    "ece": (
        "Calibration error (ECE)",
        "mean distance between how sure the model is and how often it is right. 0 is perfect.",
    ),
    "coverage": ("Answered", "of the clips get an answer; the others are called “uncertain”."),
    "error": ("Wrong among answers", "of the given answers are wrong."),
}

_COLUMNS = {"macro_f1": "macro-F1", "ece": "ECE", "brier": "Brier", "nll": "NLL"}


def title(run: Run) -> str:
    """What the page is about."""
    model = run.settings.get("model", "Model")
    if run.split.startswith("out of"):  # so many folds
        return f"{model}: results {run.split}"
    split = {"val": "validation", "train": "training"}.get(run.split, run.split)
    return f"{model}: results on the {split} clips"


def warnings(run: Run, names: Names) -> list[tuple[str, str]]:
    """(title, text) of what a reader must know before believing a number."""
    results, found = run.results, []
    if count := results.get("unreadable_clips"):
        whole = count + results["clips"]
        text = f"{count} of {whole} clips could not be read and are in none of the numbers below."
        found.append(("Missing clips", text))
    for text in results.get("warnings", []):
        title = "Leakage" if "LEAKAGE" in text else "Warning"
        found.append((title, names.hide(text.replace("LEAKAGE: ", ""))))
    # The name of another manifest stands in the split's place.
    if run.split in ("train", "val") and not results.get("csv"):
        seen = "was trained on" if run.split == "train" else "was chosen and calibrated on"
        text = f"The model {seen} these clips: on new ones it will do worse."
        found.append(("Not a test", text))
    if results.get("shuffle_frames"):
        text = "The frames of each clip were shuffled in time: this tests what motion contributes."
        found.append(("Shuffled frames", text))
    if adjust := results.get("adjust"):
        text = (
            f"The logits were adjusted by {adjust:g} x the log of the classes' shares of training."
        )
        found.append(("Adjusted", text))
    return found


def interval_note(run: Run) -> str:
    """How much the intervals are worth."""
    patients, unknown = run.results["patients"], run.results["clips_of_unknown_patient"]
    if not patients:
        return (
            "No patient is known for any clip, so there is no interval worth the name: clips of "
            "one patient resemble each other, and intervals that overlook it are too narrow. Only "
            "those are shown, in small print. Give the manifest a column “patient”."
        )
    if patients == 1 and not unknown:
        return (
            "All clips come from one patient, who cannot tell how patients differ: there is no "
            "interval worth the name, and nothing here says how the model does on other patients."
        )
    note = (
        "The interval to quote resamples whole patients, because clips of one patient resemble "
        "each other; the one in small print takes every clip as independent and is, as a rule, "
        "too narrow."
    )
    if unknown:
        note += f" {unknown} clips of unknown patients count as a patient each: still too narrow."
    if patients < 10:
        note += f" With so few patients ({patients}) even the first is rough."
    if run.results["accuracy"] == 1:
        note += " No clip was wrong, so the intervals have no width; that proves no perfection."
    return note


def cards(run: Run, more: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """The headline numbers with both intervals."""
    results = run.results
    values = {**results, **results["selective"], "ece": results["calibration"]["ece"]}
    known = {**results["intervals"], **more}
    return [
        _card(run, name, title, meaning, values[name], known[name])
        for name, (title, meaning) in _CARDS.items()
    ]


def _card(
    run: Run,
    name: str,
    title: str,
    meaning: str,
    value: float | None,
    found: Mapping[str, Interval],
) -> dict[str, Any]:
    in_percent = name not in ("macro_f1", "ece")
    wide = found.get("patients") if run.results["patients"] else None
    naive = found.get("clips")
    text = percent(value) if in_percent else decimals(value)
    words = span(wide, in_percent)
    high = 1.0
    if name in ("ece", "error"):  # small, if the model is any good
        high = percent_axis("", max([value or 0, *(wide or ()), *(naive or ())])).high
    baseline = run.results["chance_accuracy"] if name == "accuracy" else None
    ends = ("0", percent(high, 0) if in_percent else f"{high:g}")
    label = f"{title} {text}" + (f", 95 % interval {words}" if words else ", no interval")
    whisker = Whisker(label, value or 0, high, ends, wide, naive, baseline)
    return {
        "title": title,
        "value": text,
        "meaning": meaning,
        "wide": words,
        "naive": span(naive, in_percent),
        "whisker": None if value is None else whisker,
        "baseline": percent(baseline) if baseline is not None else "",
    }


def confusion(run: Run) -> list[dict[str, Any]]:
    """A row a true class: its name, how many clips, and (count, share or None) a class."""
    rows = []
    for name, counts in zip(run.classes, run.predictions.confusion, strict=True):
        whole = int(counts.sum())
        cells = [(int(count), count / whole if whole else None) for count in counts]
        rows.append({"name": name, "clips": whole, "cells": cells})
    return rows


def per_class(run: Run, more: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """A row a class: its scores and the patient-level interval of its recall."""
    table = []
    for name in run.classes:
        row = dict(run.results["per_class"][name])
        known = row["clips"] and run.results["patients"]
        row["interval"] = more[f"recall of {name}"]["patients"] if known else None
        table.append({"name": name, **row})
    return table


def averages(run: Run) -> list[dict[str, Any]]:
    """The scores if every clip, every video, or every patient counts the same."""
    rows = []
    for unit, found in run.results["averages"].items():
        units = run.results["clips"] if unit == "clip" else found.get("units", 0)
        rows.append({"unit": unit, "units": units, **found})
    return rows


def mistakes(run: Run, names: Names, most: int) -> list[dict[str, Any]]:
    """The wrong clips of the highest confidence."""
    predictions = run.predictions
    wrong = np.flatnonzero(~predictions.right)
    worst = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:most]
    return [
        {
            "clip": names.clips[place],
            "path": predictions.rows[place].path,
            "true": run.classes[predictions.labels[place]],
            "said": run.classes[predictions.predicted[place]],
            "confidence": float(predictions.confidence[place]),
            "truth": float(predictions.probabilities[place, predictions.labels[place]]),
            "answered": bool(run.answered[place]),
        }
        for place in worst
    ]


def settings(run: Run, names: Names) -> dict[str, Any]:
    """Commands, versions, hardware and settings, in text, without anybody's name."""
    facts = ("checkpoint", "epoch", "split", "views", "crops", "adjust", "command")
    shown = {name: run.results[name] for name in facts if name in run.results}
    return {
        "evaluation": {
            name: (names.hide_command if name == "command" else names.hide)(_text(value))
            for name, value in shown.items()
        },
        "training": [_session(one, names) for one in run.sessions],
        "evaluations": [_session(one, names) for one in run.evaluations],
        "config": {name: names.hide(_text(value)) for name, value in run.settings.items()},
    }


def folds(run: Run, names: Names) -> dict[str, Any] | None:
    """cross_validation.csv: a name and numbers a row, counts whole, `patients` how many."""
    if run.folds is None:
        return None
    numbers = run.folds.iloc[:, 1:].select_dtypes("number")
    whole = [name for name in numbers if (numbers[name].dropna() % 1 == 0).all()]
    rows = [
        [
            "" if pd.isna(value) else f"{value:.0f}" if name in whole else f"{value:.3f}"
            for name, value in row.items()
        ]
        for row in numbers.to_dict("records")
    ]
    first = [names.hide(str(name)) for name in run.folds.iloc[:, 0]]
    return {
        "columns": [_COLUMNS.get(name, name.replace("_", " ")) for name in numbers],
        "rows": list(zip(first, rows, strict=True)),
    }


def _session(session: Mapping[str, Any], names: Names) -> dict[str, str]:
    texts = {name: _text(value) for name, value in session.items()}
    return {**texts, "command": names.hide_command(texts.get("command", ""))}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
