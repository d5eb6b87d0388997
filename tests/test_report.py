"""report.py: the numbers, whom the page names, and what a browser makes of it."""

import base64
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CUT_TEXTS,
    HOSTILE,
    LONG_NAMES,
    PALE_TEXTS,
    UNNAMED,
    WIDTHS,
    make_clip,
    run_script,
    write_images,
)

from checkpoint import load_checkpoint, rebuild_model, save_checkpoint
from clips.manifest import CLASSES, ClipRow
from dataset import ClipsDataset, get_val_transform
from evaluation import bootstrap, metrics
from evaluation.calibration import Calibration, apply_temperature
from evaluation.predictions import Predictions, write_predictions
from evaluation.results import write_results
from evaluation.runs import read_run
from explanation.methods import advice, default_method, explain
from explanation.mistakes import RelevanceCurve, explain_mistakes
from report import main
from training.log import write_history
from utils.errors import UserError
from utils.files import write_json
from video.clip_reader import FrameSampler, read_clip
from web import report_figures
from web.anonymize import HIDDEN, Redactor, pseudonymize, redact
from web.report_data import load_report_data, more_intervals
from web.report_figures import relevance
from web.report_page import build_page
from web.report_sections import mistakes

PATIENTS = [f"Kovacs-{number:03d}" for number in range(31, 43)]
LEAKAGE = "4 of 12 patients of test are also in train (97 of 371 test clips): memory"


def make_predictions(
    classes: tuple[str, ...] = CLASSES,
    patients: int = 12,
    clips: int = 20,
    missing_classes: int = 6,
) -> Predictions:
    """Predictions of a model that does well on some patients and badly on others."""
    rng = np.random.default_rng(0)
    rows, logits = [], []
    for number, patient in enumerate(PATIENTS[:patients]):
        for clip in range(clips + number):
            label = int(rng.choice([c for c in range(len(classes)) if c != missing_classes]))
            video = f"{patient}_V{clip // 8}"
            path = Path(f"/gone/clips of {patient}/Clip_P{patient}_C{clip}_part1.mp4")
            rows.append(ClipRow(path, label, patient, video, f"{video}_C{clip // 2}"))
            logits.append(rng.normal(0, 1.4, len(classes)) + (np.arange(len(classes)) == label) * 3)
            logits[-1] *= 1 + number / 12
    return Predictions(rows, apply_temperature(np.exp(np.array(logits)), 1.0))


def write_run(folder: Path, predictions: Predictions, classes: tuple[str, ...]) -> Path:
    """A run folder as train.py writes it, with the names of patients in a path and a command."""
    predictions.unreadable[:] = ["a.mp4: no such file", "b.mp4: no such file"]
    metadata = {"checkpoint": f"runs/{PATIENTS[0]}/best.pt", "epoch": 2, "split": "test"}
    metadata["warnings"] = [{"kind": "leakage", "text": LEAKAGE}]
    calibration = Calibration(1.4, 0.1, 0.62)
    write_results(predictions, classes, folder, [calibration], metadata)
    columns = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1")
    values = ((1.9, 0.3, 1.8, 0.35, 0.3), (1.2, 0.6, 1.3, 0.5, 0.52), (0.9, 0.8, 1.4, 0.5, 0.49))
    history = [
        {"epoch": number, **dict(zip(columns, row, strict=True)), "learning_rate": 1e-4 / number}
        for number, row in enumerate(values, 1)
    ]
    write_history(folder / "metrics.csv", history)
    write_json(
        folder / "config.json",
        {
            "model_name": "tsm_resnet",
            "data_root": f"/data/{PATIENTS[1]}",
            "batch_size": 16,
            "classes": classes,
        },
    )
    command = f"python train.py --data-root /data/{PATIENTS[1]} --test-csv {PATIENTS[2]}.csv"
    command += " --select-by val_macro_f1 --layer-decay 0.75 --logit-adjust-tau 1 --cutmix-alpha 1"
    session = {"command": command, "torch": "2.14.1", "device": "NVIDIA H100", "commit": "23b73c7+"}
    write_json(folder / "environment.json", {"sessions": [session]})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "20260101-120000_tsm_resnet"
    return write_run(folder, make_predictions(), CLASSES)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return make_page(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The path and the text of a page with hostile names and the frames of three clips."""
    folder = tmp_path_factory.mktemp("hostile") / 'a "quoted" <folder>'
    predictions = make_predictions(HOSTILE)
    wrong = np.flatnonzero(~predictions.correct)
    worst = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:3]
    for number, index in enumerate(worst):
        path = make_clip(folder / "clips" / f"<i>{number}.mp4", 200, frames=10, size=48)
        predictions.rows[index] = predictions.rows[index]._replace(path=path)
    write_run(folder, predictions, HOSTILE)
    text = make_page(folder, with_frames=True, with_patients=True)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html", text


def make_page(folder: Path, **options: bool | int) -> str:
    return build_page(load_report_data(folder), **options)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "test_metrics.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """The elements of a page, and its text as a browser shows it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] != [("style", {})]:
            self.pieces.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.pieces.append(" " * (tag in ("td", "th", "title", "text")))  # separates cells

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).replace("\u00a0", " ").split())


def test_the_headline_is_that_of_test_metrics(run: Path, page: str) -> None:
    text, results = Page(page).text, results_of(run)
    ece, selective = results["calibration"]["ece"], results["selective"]
    for title, value in (
        ("Accuracy", f"{results['accuracy']:.1%}"),
        ("Balanced accuracy", f"{results['balanced_accuracy']:.1%}"),
        ("Macro-F1", f"{results['macro_f1']:.3f}"),
        ("Calibration error (ECE)", f"{ece:.3f}"),
        ("Coverage", f"{selective['coverage']:.1%}"),
        ("Error among answered clips", f"{selective['error']:.1%}"),
    ):
        assert f"{title} {value.replace('%', ' %')}" in text
    for kind, words in (("patients", "{} (95 % interval)"), ("clips", "independent: {}")):
        low, high = results["intervals"]["macro_f1"][kind]
        assert words.format(f"{low:.3f} to {high:.3f}") in text
    assert f"{results['clips']} clips of 12 patients, 7 classes" in text
    assert f"{100 * results['majority_baseline']:.1f} %, the accuracy of always predicting" in text
    for name in ("ece", "brier", "nll"):
        before, after = results["calibration"]["before"][name], results["calibration"][name]
        assert f"{before:.3f} {after:.3f}" in text
    assert f"{results['selective']['aurc']:.3f}" in text


def test_average_precision_and_its_curves(run: Path, page: str) -> None:
    text, results = Page(page).text, results_of(run)
    assert f"macro average precision{results['macro_average_precision']:.3f}" in text
    assert f"top-2 accuracy{100 * results['top2_accuracy']:.1f} %" in text
    for name, row in results["per_class"].items():
        value = row["average_precision"]
        shown = "no clips of this class" if value is None else f"average precision {value:.3f}"
        assert f"{name} {shown}" in text.replace("\n", " ")
    titles = re.findall(r"<title>(\S+): precision against recall", page)
    assert titles == [name for name, row in results["per_class"].items() if row["clips"]]


def test_the_learning_rate_is_drawn(page: str) -> None:
    assert "<title>at the end of the epoch learning rate over the epochs</title>" in page


def test_the_map_of_the_clips_is_shown_if_there_is_one(run: Path, page: str, tmp_path) -> None:
    assert "Which clips are alike" not in page
    folder = shutil.copytree(run, tmp_path / "run")
    picture = b"\x89PNG\r\n\x1a\n and so on"
    (folder / "embedding.png").write_bytes(picture)
    (image,) = [a for tag, a in Page(make_page(folder)).elements if tag == "img"]
    assert image["src"] == "data:image/png;base64," + base64.b64encode(picture).decode()
    (folder / "embedding.png").write_bytes(b"<svg onload=alert(1)>")
    assert "Which clips are alike" not in make_page(folder)


def test_warnings_come_first(page: str) -> None:
    text = Page(page).text
    assert text.index("Missing clips. 2 of") < text.index("Headline results")
    assert text.index("Leakage. 4 of 12 patients") < text.index("Headline results")
    assert "Confidential" not in text


def test_where_nothing_is_answered_the_switch_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_predictions(), CLASSES)
    fitted = Calibration(1.4, 0.1, None, (0.9, 0.8, 0.7, 0.6), (True, True, False, True))
    write_results(make_predictions(), CLASSES, folder, [fitted])
    sentence = "--target-error 0.25 would answer 2 of the 4 validation clips, 0% of these wrongly"
    text = Page(make_page(folder)).text
    assert text.count(f"With evaluate.py and predict.py, {sentence}.") >= 2  # summary and section


def test_leakage_is_known_by_its_kind(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    kinds = {"class balance": "balanced twice", "other": "no LEAKAGE here"}
    warnings = [{"kind": kind, "text": text} for kind, text in kinds.items()]
    write_json(tmp_path / "run" / "test_metrics.json", {**results_of(run), "warnings": warnings})
    text = Page(make_page(tmp_path / "run")).text
    assert "Class balance. balanced twice" in text
    assert "Warning. no LEAKAGE here" in text
    assert "Leakage." not in text


def test_results_of_an_earlier_version_are_understood(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    results = results_of(run)
    results["chance_accuracy"] = results.pop("majority_baseline")
    results["selective"]["wanted_error"] = results["selective"].pop("target_error")
    for kind in ("video", "patient"):
        results["averages"][kind]["units"] = results["averages"][kind].pop("groups")
    results["warnings"] = [f"LEAKAGE: {LEAKAGE}"]
    write_json(folder / "test_metrics.json", results)
    table = (folder / "predictions.csv").read_text(encoding="utf-8")
    table = table.replace(",decision,", ",answer,", 1)
    (folder / "predictions.csv").write_text(table, encoding="utf-8")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["model"] = settings.pop("model_name")
    write_json(folder / "config.json", settings)
    expected, text = (Page(make_page(path)).text for path in (run, folder))
    expected, text = (page.split("Reproducing the results")[0] for page in (expected, text))
    made = r"\d{4}-\d\d-\d\d \d\d:\d\d"  # a minute may pass between the two
    text = text.replace("Run run", f"Run {run.name}")
    assert re.sub(made, "", text) == re.sub(made, "", expected)


def test_an_absent_class_is_not_a_zero(page: str) -> None:
    text = Page(page).text
    assert "Suction no clips of this class in this split" in text
    assert "Suction no clips in this split; left out of the averages" in text


def test_the_table_holds_the_confusion_matrix(run: Path, page: str) -> None:
    table = page.split('<table class="confusion"')[1].split("</table>")[0]
    cells = re.findall(r'<td class="cell.*?</td>', table)
    counts = [int(re.search(r"<b>(\d+)|>(0)<", cell)[0].strip("<b>")) for cell in cells]
    matrix = load_report_data(run).predictions.confusion[:6]  # the last class has no clips
    assert counts == matrix.ravel().tolist()
    assert table.count('scope="row"') == 7
    assert table.count('scope="col"') == 9


def test_intervals_agree_with_bootstrap_where_they_overlap(tmp_path: Path) -> None:
    """With clips of one class only, its recall and the accuracy are the same number."""
    predictions = make_predictions(("a", "b"), missing_classes=1)
    write_results(predictions, ("a", "b"), tmp_path, [Calibration(1.0, 0.1, 0.8)])
    data = load_report_data(tmp_path)
    intervals = more_intervals(data)
    for kind in ("patients", "clips"):
        expected = data.results["intervals"]["accuracy"][kind]
        assert intervals["recall of a"][kind] == pytest.approx(expected)
    assert intervals["recall of b"] == {"patients": None, "clips": None}
    for values, estimate in (
        (intervals["ece"], data.results["calibration"]["ece"]),
        (intervals["coverage"], data.results["selective"]["coverage"]),
        (intervals["error"], data.results["selective"]["error"]),
    ):
        low, high = values["patients"]
        assert 0 <= low <= estimate <= high <= 1


def test_the_interval_of_the_ece_is_that_of_resampled_clips(run: Path) -> None:
    data = load_report_data(run)
    predictions, ece = data.predictions, data.results["calibration"]["ece"]
    patients = predictions.groups("patient")
    order = bootstrap.canonical_order(predictions.labels, predictions.probabilities, patients)
    (weights,) = bootstrap.cluster_bootstrap_weights(patients[order], 60)
    values = [
        metrics.expected_calibration_error(
            np.repeat(predictions.confidence[order], count),
            np.repeat(predictions.correct[order], count),
        )
        for count in weights.astype(int)
    ]
    low, high = bootstrap.confidence_interval(np.array(values), 12)
    mirrored, _ = bootstrap.confidence_interval(2 * ece - np.array(values), 12)
    expected = [max(0, min(low, mirrored)), max(high, ece)]
    assert more_intervals(data, n_resamples=60)["ece"]["patients"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("patients", "words"), [(0, "No patient is known for any clip"), (1, "come from one patient")]
)
def test_without_patients_there_is_no_interval(tmp_path: Path, patients: int, words: str) -> None:
    predictions = make_predictions(("a", "b"), patients=1, missing_classes=9)
    if not patients:
        predictions.rows = [row._replace(patient=None, video=None) for row in predictions.rows]
    write_results(predictions, ("a", "b"), tmp_path, [Calibration()])
    text = Page(make_page(tmp_path)).text
    assert words in text
    assert "there is no interval over patients" in text
    assert "no interval over patients" in text
    assert "(95 % interval)" not in text
    assert "There is no metrics.csv here" in text
    assert "There is no config.json here" in text
    assert "No threshold was chosen, so every clip is answered" in text


def names_in(folder: Path) -> set[str]:
    rows = load_report_data(folder).predictions.rows
    names = {name for row in rows for name in (row.patient, row.video, row.action)}
    return names | {text for r in rows for text in (str(r.path), r.path.name, r.path.stem)}


def test_no_name_is_shown_by_default(run: Path, page: str) -> None:
    shown = page + html.unescape(page)
    assert not [name for name in names_in(run) if name in shown]
    assert HIDDEN in page
    assert re.search(r"clip \d+ of patient \d+", page)
    assert "data:image" not in page
    assert "batch_size" in page
    assert "NVIDIA H100" in page


def test_names_are_shown_on_request_with_a_warning(run: Path) -> None:
    page = make_page(run, with_patients=True)
    shown = html.unescape(page)
    assert all(patient in shown for patient in PATIENTS)
    assert shown.count("Clip_PKovacs") == 12  # the worst mistakes
    assert HIDDEN not in page
    text = Page(page).text
    assert "Confidential, do not pass on. This page contains patient identifiers." in text
    assert "<title>CONFIDENTIAL" in page
    assert "data:image" not in page


def test_patients_are_numbered_by_accuracy(run: Path, page: str) -> None:
    predictions = load_report_data(run).predictions
    units = predictions.groups("patient")
    accuracies = sorted(float(predictions.correct[units == name].mean()) for name in PATIENTS)
    shown = re.findall(r"patient (\d+): ([\d.]+)\u00a0% of \d+ clips correct", page)
    assert shown == [(str(n), f"{100 * value:.1f}") for n, value in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("text", "identifiers", "expected"),
    [
        ("--csv p/Clip_P058_V1.mp4", ["058"], f"--csv p/Clip_P{HIDDEN}_V1.mp4"),
        ("--seed 58 runs/10580_x", ["58", "058"], "--seed 58 runs/10580_x"),
        ("/data/Anna/x", ["anna"], f"/data/{HIDDEN}/x"),
        ("/data/Annabel/x", ["Anna"], "/data/Annabel/x"),
        ("--model-name r2plus1d a_2.csv", ["2"], f"--model-name r2plus1d a_{HIDDEN}.csv"),
        ("open 'A B.mp4' now", ["A B.mp4", "A B"], f"open '{HIDDEN}' now"),
        ("a.b+c", ["a.b+c", "b"], HIDDEN),
        ("nothing", [], "nothing"),
    ],
)
def test_names_are_removed_from_typed_text(
    text: str, identifiers: list[str], expected: str
) -> None:
    assert redact(text, identifiers) == expected


def test_hostile_names_are_text(hostile: tuple[Path, str]) -> None:
    parsed = Page(hostile[1])
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "b1", "i", "base"}
    images = [attrs for tag, attrs in parsed.elements if tag == "img"]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in images)
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    for name in HOSTILE:
        assert name in parsed.text
    assert 'a "quoted" <folder>' in parsed.text
    assert "<i>0.mp4" in parsed.text


def test_frames_are_shown_on_request_with_a_warning(hostile: tuple[Path, str]) -> None:
    text = Page(hostile[1]).text
    assert hostile[1].count('src="data:image/jpeg;base64,') == 3 * 8
    assert text.count("this clip is no longer there") == 9
    assert "This page contains video frames and patient identifiers." in text
    assert "data:" not in make_page(hostile[0].parent).replace("img-src data:", "")


def test_the_page_loads_nothing(page: str, hostile: tuple[Path, str]) -> None:
    for source in (page, hostile[1]):
        assert "http:" not in source
        assert "https:" not in source
        assert "url(" not in source
        assert "@import" not in source
        for _, attrs in Page(source).elements:
            assert attrs.get("href", "#").startswith("#")
            assert attrs.get("src", "data:").startswith("data:")
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', source)[1]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_a_folder_of_evaluate_uses_its_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    inside = tmp_path / "run" / "evaluate_val"
    inside.mkdir()
    for name in ("test_metrics.json", "predictions.csv"):
        shutil.copy(run / name, inside)
    write_json(inside / "test_metrics.json", {**results_of(run), "split": "val"})
    text = Page(make_page(inside)).text
    assert "tsm_resnet: results on the validation clips" in text
    assert "Not a test." in text
    assert "kept: epoch 2" in text
    assert "NVIDIA H100" in text


def test_a_cross_validation_has_one_line_per_fold(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "cv")
    folder = tmp_path / "cv"
    for number in (1, 2, 10):
        (folder / f"fold{number}").mkdir()
        shutil.copy(run / "metrics.csv", folder / f"fold{number}")
    (folder / "metrics.csv").unlink()
    results = {**results_of(run), "split": "out of 3 folds"}
    results["calibration"]["temperature"] = results["selective"]["threshold"] = None
    write_json(folder / "test_metrics.json", results)
    rows = [",clips,patients,accuracy", "fold1,70,3,0.61", "mean,,,0.615"]
    (folder / "cross_validation.csv").write_text("\n".join(rows), encoding="utf-8")
    page = make_page(folder)
    text = Page(page).text
    assert "tsm_resnet: results out of 3 folds" in text
    lines = re.findall(r"<title>(fold\d+) training</title>", page)
    assert lines == ["fold1", "fold2", "fold10"]
    assert page.count("epoch 2 was kept") == 3 * 3  # on loss, scores and learning rate
    assert "fold1 70 3 0.610" in text
    assert "below the threshold of the model of its fold" in text
    assert "The model of each fold has its own temperature" in text


def test_the_script_writes_the_page_or_one_line(run: Path, tmp_path: Path, mistake) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    done = run_script("report.py", folder, cwd=tmp_path)
    assert done.stdout.strip() == f"report: {folder / 'report.html'}"
    assert (folder / "report.html").read_text(encoding="utf-8").endswith("</html>")
    (folder / "test_metrics.json").unlink()
    code, stderr = mistake(main, folder, cwd=tmp_path)
    assert code == 2
    assert stderr.count("\n") == 1
    assert f"train.py --resume {folder}" in stderr


def test_a_report_is_written_without_heavy_libraries(
    run: Path, mistaken: Path, tmp_path: Path
) -> None:
    """Neither where there is nothing to explain, nor where no mistake is asked for."""
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[1], run_name='__main__')\n"
    code += "except SystemExit: pass\nprint(*sys.modules)"
    script = Path(__file__).parents[1] / "report.py"
    heavy = {"torch", "torchvision", "matplotlib", "PIL", "av", "sklearn", "aiohttp"}
    evaluation = shutil.copytree(mistaken.parent, tmp_path / "trained") / mistaken.name
    for arguments, unwanted in (
        (["--help"], heavy | {"pandas", "scipy", "jinja2"}),
        ([shutil.copytree(run, tmp_path / "run")], heavy),
        ([evaluation, "--mistakes", "0"], heavy),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, script, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(script.parent)},
        )
        assert not unwanted & set(done.stdout.split("\n")[-2].split())


def test_tables_that_are_not_tables(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    for content in ("", "epoch,val_loss\n1,0.5\n2\n"):
        (folder / "metrics.csv").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="not a table"):
            load_report_data(folder)
    (folder / "metrics.csv").write_text("epoch,val_loss\n", encoding="utf-8")
    assert load_report_data(folder).histories == []
    (folder / "metrics.csv").write_text(f"epoch,val_loss\n{'9' * 5001},1\n", encoding="utf-8")
    with pytest.raises(UserError, match="an epoch is no number"):
        load_report_data(folder)
    (folder / "metrics.csv").write_text(
        "epoch,val_macro_f1,note\n1,,a\n2,0.5,b\n3,0.5,c\n", encoding="utf-8"
    )
    write_json(folder / "test_metrics.json", {**results_of(run), "epoch": None})
    (history,) = load_report_data(folder).histories
    assert history.best_epoch == 2
    assert list(history.table) == ["epoch", "val_macro_f1"]


def test_results_that_cannot_be_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_report_data(tmp_path / "nowhere")
    shutil.copytree(run, tmp_path / "run" / "evaluate_test")
    with pytest.raises(UserError, match="there are results in evaluate_test"):
        load_report_data(tmp_path / "run")
    folder = tmp_path / "run" / "evaluate_test"
    results = results_of(run)
    write_json(folder / "test_metrics.json", {**results, "clips": 3})
    with pytest.raises(UserError, match="are not of the same test"):
        load_report_data(folder)
    write_json(folder / "test_metrics.json", {"accuracy": 0.5})
    with pytest.raises(UserError, match="earlier version"):
        load_report_data(folder)
    (folder / "test_metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        load_report_data(folder)


KAZAKH = ("Құрсақ қуысына кіру", "Қысқыш салу", "Ілгекпен кесу", "Жергілікті көрініс", "Тігу")

FIFTY_LETTERS = (
    *(f"a_class_of_exactly_fifty_letters_in_all_with_end_{c}" for c in "abc"),
    "W" * 50,
    "О" * 50,
)

NAMELESS = """() => [...document.querySelectorAll("svg")].filter(
  svg => svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")
    || svg.querySelector("title")?.textContent !== svg.getAttribute("aria-label")).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, hostile: tuple[Path, str], scheme: str) -> None:
    """No script runs, nothing is loaded, nothing is wider than the screen, all text is readable."""
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    messages, requests, dialogs = [], [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url[:40]))
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    address = hostile[0].as_uri()
    for width in (360, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.goto(address)
        tab.evaluate(
            "document.querySelectorAll('details').forEach(element => { element.open = true })"
        )
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        seen, pale = tab.evaluate(PALE_TEXTS)
        assert seen > 300
        assert pale == []
        assert tab.evaluate(NAMELESS) == 0
        loaded = "[...document.images].every(image => image.complete && image.naturalHeight == 112)"
        assert tab.evaluate(loaded)
    assert dialogs == []
    assert messages == []
    own = [url for url in requests if not url.startswith("data:image/jpeg")]
    assert set(own) == {address[:40]}
    context.close()


def test_the_printed_page_is_light_and_complete(browser, hostile: tuple[Path, str]) -> None:
    tab = browser.new_page(viewport={"width": 690, "height": 1000})
    tab.emulate_media(media="print", color_scheme="dark")
    tab.goto(hostile[0].as_uri())
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(24, 32, 43)"
    hidden = """[...document.querySelectorAll("details > :not(summary)")].filter(
      element => !element.checkVisibility({contentVisibilityAuto: true})).length"""
    assert tab.evaluate(hidden) == 0
    wide = "Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))"
    assert tab.evaluate(wide) <= 690
    tab.close()


@pytest.mark.parametrize(
    "classes",
    [("cut", "sew"), CLASSES, KAZAKH, HOSTILE, (*LONG_NAMES, *"abcdef"), FIFTY_LETTERS],
    ids=["short", "SLAM", "Kazakh", "hostile", "long", "fifty letters"],
)
def test_all_texts_are_whole(browser, tmp_path: Path, classes: tuple[str, ...]) -> None:
    predictions = make_predictions(classes, missing_classes=min(6, len(classes) - 1))
    folder = write_run(tmp_path / "run", predictions, classes)
    (tmp_path / "report.html").write_text(make_page(folder), encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true })")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate(CUT_TEXTS, ".scroll:has(.confusion)") == [], width
    assert tab.evaluate(UNNAMED) == []
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 690, "height": 1000})  # A4 with its margins
    assert tab.evaluate(CUT_TEXTS, None) == []
    tab.close()


@pytest.fixture(scope="module")
def mistaken(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a tiny trained run, with an evaluation of clips all of whose labels are wrong."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("mistaken") / "run")
    write_mistakes(folder, folder / "evaluate_wrong")
    return folder / "evaluate_wrong"


def write_mistakes(run: Path, folder: Path, folds: Sequence[str] = (), **metadata: object) -> Path:
    """The results of a run as if every answer of it were wrong."""
    known = load_report_data(run)
    predictions, count = known.predictions, len(known.classes)
    rows = [
        row._replace(label=(int(answer) + 1) % count)
        for row, answer in zip(predictions.rows, predictions.y_pred, strict=True)
    ]
    wrong = Predictions(rows, predictions.probabilities)
    facts = {"checkpoint": str(run / "best.pt"), "split": "test", "warnings": []} | metadata
    write_results(wrong, known.classes, folder, [Calibration()], facts)
    if folds:
        write_predictions(folder / "predictions.csv", wrong, known.classes, 0.0, folds)
    return folder


def test_the_curves_of_mistakes_are_those_of_the_model(mistaken: Path) -> None:
    run = load_report_data(mistaken).run
    config, state = run.config, run.load_state()
    curves = explain_mistakes(run, [4, 0])
    clips = ClipsDataset(run.predictions.rows, config.n_frames, 32, transform=get_val_transform(32))
    model = rebuild_model(state)
    for index, curve in zip([4, 0], curves, strict=True):
        clip, label = clips[index]
        pair = torch.tensor([run.predictions.y_pred[index]]), torch.tensor([label])
        method = default_method(config.model_name)
        expected = explain(model, clip[None], pair[0], method, pair[1]).frames[0]
        assert curve.missing == ""
        np.testing.assert_allclose(curve.values, expected, rtol=1e-3, atol=1e-5)
        # 4 of 20 frames at 25 frames per second: the middles of four equal parts
        assert curve.in_seconds
        np.testing.assert_allclose(curve.times, np.array([2, 7, 12, 17]) / 25)


def test_the_page_shows_the_curves_without_names(mistaken: Path) -> None:
    page = make_page(mistaken)
    run = load_report_data(mistaken).run
    curves = explain_mistakes(run, [m["index"] for m in mistakes_of(mistaken)])
    labels = re.findall(r'aria-label="(Mistake \d+: relevance of 4 frames for [^"]+)"', page)
    assert len(labels) == len(curves) == 9
    for number, (label, curve) in enumerate(zip(labels, curves, strict=True), 1):
        peak = f"largest at {curve.times[curve.values.argmax()]:.2f} s"
        assert label.startswith(f"Mistake {number}: ") and label.endswith(peak)
    text = Page(page).text
    assert "why the model chose the predicted class and not the labelled one" in text
    assert "it is not the cause" in text.lower()
    assert "No curve" not in text
    assert f"Method: {default_method(run.config.model_name)}." in text
    warnings = advice(run.config.model_name, curves[0].method)
    assert all(text.count(f"About the curves: {line[9:]}.") == 1 for line in warnings)
    shown = page + html.unescape(page)
    assert not [name for name in names_in(mistaken) if name and name in shown]
    assert "data:image" not in page.split('id="mistakes"')[1]


def mistakes_of(folder: Path) -> list[dict]:
    data = load_report_data(folder)
    return mistakes(data, pseudonymize(data.predictions, False), 12)


def test_there_is_a_reason_where_there_is_no_curve(mistaken: Path, tmp_path: Path) -> None:
    def reasons(**metadata: object) -> list[str]:
        folder = write_mistakes(mistaken.parent, tmp_path / "results", **metadata)
        return [curve.missing for curve in explain_mistakes(read_run(folder), range(9))]

    assert (
        reasons(shuffle_frames=True)
        == ["the model saw its frames in another order (--shuffle-frames)"] * 9
    )
    gone = str(tmp_path / "nowhere" / "last.pt")  # not the best.pt that is beside the settings
    assert reasons(checkpoint=gone) == ["there is no checkpoint here"] * 9
    (tmp_path / "damaged.pt").write_bytes(b"not a checkpoint")
    damaged = str(tmp_path / "damaged.pt")
    assert reasons(checkpoint=damaged) == ["the checkpoint here cannot be read"] * 9

    # A model with another answer is not explained instead of the one of the test.
    state = load_checkpoint(mistaken.parent)
    for name, tensor in state["model"].items():
        if tensor.dim() and len(tensor) == 3:  # of the classifier: there are three classes
            state["model"][name] = tensor.roll(1, 0)
    save_checkpoint(tmp_path / "other.pt", state)
    other = str(tmp_path / "other.pt")
    assert all("answers otherwise: " in r for r in reasons(checkpoint=other))
    assert all("without --logit-adjust-tau it is " in r
               for r in reasons(checkpoint=other, logit_adjust_tau=1.0))  # fmt: skip
    assert all("the mean of 6 views; in the middle one it is " in r
               for r in reasons(checkpoint=other, views=2, crops=3))  # fmt: skip


def test_a_clip_that_is_gone_has_a_reason_and_the_others_a_curve(
    mistaken: Path, tmp_path: Path
) -> None:
    run = load_report_data(mistaken).run
    rows = list(run.predictions.rows)
    rows[0] = rows[0]._replace(path=tmp_path / "Kovacs.mp4")
    (tmp_path / "Nagy.mp4").write_bytes(b"no video")
    rows[1] = rows[1]._replace(path=tmp_path / "Nagy.mp4")
    changed = dataclasses.replace(run, predictions=Predictions(rows, run.predictions.probabilities))
    missing = [curve.missing for curve in explain_mistakes(changed, [0, 1, 2])]
    assert missing == ["this clip is no longer there", "this clip cannot be read", ""]


def test_a_model_that_cannot_be_built_here_is_a_reason(
    mistaken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report does not need the optional packages of the model's backbone."""

    def fail(_: dict) -> None:
        raise UserError("timm is not installed: pip install timm")

    monkeypatch.setattr("checkpoint.rebuild_model", fail)
    curves = explain_mistakes(load_report_data(mistaken).run, [0, 1])
    reason = "the model cannot be built here: timm is not installed: pip install timm"
    assert [curve.missing for curve in curves] == [reason] * 2


def scale_last_layer(weights: dict[str, torch.Tensor], factor: int) -> dict[str, torch.Tensor]:
    last = [name for name, tensor in weights.items() if tensor.dim() and len(tensor) == 3]
    assert len(last) == 2  # weight and bias of the classifier: three classes
    return {name: value * (factor if name in last else 1) for name, value in weights.items()}


def test_each_fold_explains_its_own_clips(mistaken: Path, tmp_path: Path) -> None:
    """Two folds with different models; a cell of predictions.csv leads to no other folder."""
    run, folder = mistaken.parent, tmp_path / "cv"
    state = load_checkpoint(run)
    for number in (1, 2):
        (folder / f"fold{number}").mkdir(parents=True)
        scaled = scale_last_layer(state["model"], number)
        save_checkpoint(folder / f"fold{number}" / "best.pt", {**state, "model": scaled})
    shutil.copy(run / "config.json", folder)
    folds = ["fold1", "fold2", "fold2", "../run", "fold3", *["fold1"] * 4]
    write_mistakes(run, folder, folds, checkpoint="")
    read = read_run(folder)
    assert list(read.predictions.folds) == folds
    curves = explain_mistakes(read, range(5))
    alone = explain_mistakes(load_report_data(mistaken).run, range(5))
    np.testing.assert_allclose(curves[0].values, alone[0].values, rtol=1e-4, atol=1e-6)
    for n in (1, 2):  # twice the weights of the last layer: twice the difference of two logits
        np.testing.assert_allclose(curves[n].values, 2 * alone[n].values, rtol=1e-3, atol=1e-5)
    assert [c.missing for c in curves[3:]] == ["there is no checkpoint here"] * 2


def test_images_without_a_rate_have_numbers(mistaken: Path, tmp_path: Path) -> None:
    run = load_report_data(mistaken).run
    row = run.predictions.rows[0]
    images = write_images(tmp_path / "frames", read_clip(row.path, FrameSampler(8), None).rgb)
    rows = [row._replace(path=images), *run.predictions.rows[1:]]
    changed = dataclasses.replace(run, predictions=Predictions(rows, run.predictions.probabilities))
    (curve,) = explain_mistakes(changed, [0])
    assert not curve.in_seconds
    assert curve.times.tolist() == [2, 4, 6, 8]
    chart = relevance(curve, 1, "a", "b")
    assert (chart.x.label, chart.x.low, chart.x.high) == ("frame of the clip", 2, 8)


def test_the_chart_is_relative_to_the_largest_relevance() -> None:
    values = np.array([0.5, -2.0, 1.0])
    chart = relevance(RelevanceCurve(np.array([0.1, 0.2, 0.3]), values), 3, "cut", "sew")
    assert [y for _, y in chart.lines[1].points] == [0.25, -1.0, 0.5]
    assert [mark.style for mark in chart.marks] == ["b", "a", "b"]  # also told by their shape
    assert chart.label == "Mistake 3: relevance of 3 frames for cut and not sew, largest at 0.30 s"
    nothing = relevance(RelevanceCurve(np.zeros(1), np.zeros(1)), 1, "cut", "sew")
    assert nothing.label.endswith("0 in all of them")
    assert nothing.marks == []  # it speaks for neither


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_in_a_browser(browser, mistaken: Path, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "report.html").write_text(make_page(mistaken), encoding="utf-8")
    tab = browser.new_page(color_scheme=scheme)
    tab.goto((tmp_path / "report.html").as_uri())
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate(CUT_TEXTS, ".scroll:has(.confusion)") == []
        assert tab.evaluate(PALE_TEXTS)[1] == []
        assert tab.evaluate(NAMELESS) == 0
        charts = tab.locator(".mistakes svg.chart")
        assert charts.count() == 9
        box, card = charts.first.bounding_box(), tab.locator(".mistakes li").first.bounding_box()
        assert card["x"] <= box["x"] and box["x"] + box["width"] <= card["x"] + card["width"]
        assert 80 < box["height"] < 320
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 690, "height": 1000})
    assert tab.evaluate(CUT_TEXTS, None) == []
    tab.close()


def test_the_time_of_redaction_does_not_grow_with_the_names() -> None:
    class Counted(dict):
        asked = 0

        def get(self, *arguments):
            self.asked += 1
            return super().get(*arguments)

    asked = []
    for count in (10, 5000):
        hide = Redactor([f"clip{number:06d}" for number in range(count)])
        hide._names = Counted(hide._names)
        assert hide("runs/clip000007 of others") == f"runs/{HIDDEN} of others"
        asked.append(hide._names.asked)
    assert asked[0] == asked[1]


def test_redaction_is_that_of_plain_search() -> None:
    rng = np.random.default_rng(0)
    words = [
        "Anna",
        "anna",
        "stra\u00dfe",
        "STRASSE",
        "e\u0301",
        "\u00e9",
        "p1",
        "1",
        "x y",
        "P_058",
    ]
    for _ in range(300):
        names = list(rng.choice(words, 3, replace=False))
        text = " ".join(rng.choice([*words, "--seed", "/data/", "58"], 5)).replace("/ ", "/")
        composed = unicodedata.normalize("NFC", text).casefold()
        held = {unicodedata.normalize("NFC", name) for name in names}
        assert Redactor(names)._present(composed) == {n for n in held if n.casefold() in composed}


def test_a_page_of_many_patients_shows_those_with_the_lowest_accuracy(run, monkeypatch) -> None:
    monkeypatch.setattr(report_figures, "MAX_PATIENTS", 5)
    text = make_page(run)
    assert "Shown are the 5 patients with the lowest accuracy of 12." in text
    assert "accuracy of the other 7 is from" in text
    assert "patient 5:" in text
    assert "patient 6:" not in text
