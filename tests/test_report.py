"""report.py: the numbers, whom the page names, and what a browser makes of it."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import HOSTILE, PALE_TEXTS, make_clip, run_script

from clips.manifest import CLASSES, ClipRow
from evaluation import bootstrap, metrics
from evaluation.calibration import Calibration, temper
from evaluation.predictions import Predictions
from evaluation.results import write_results
from report import ReportConfig, build_page, main
from training.log import write_history
from utils.errors import UserError
from utils.files import write_json
from web.anonymize import HIDDEN, hide
from web.report_data import load_run, more_intervals

PATIENTS = [f"Kovacs-{number:03d}" for number in range(31, 43)]
LEAKAGE = "LEAKAGE: 4 of 12 patients of test are also in train (97 of 371 test clips): memory"


def make_predictions(
    classes: tuple[str, ...] = CLASSES, patients: int = 12, clips: int = 20, absent: int = 6
) -> Predictions:
    """Answers of a model that does well with some patients and badly with others."""
    rng = np.random.default_rng(0)
    rows, logits = [], []
    for number, patient in enumerate(PATIENTS[:patients]):
        for clip in range(clips + number):
            label = int(rng.choice([c for c in range(len(classes)) if c != absent]))
            video = f"{patient}_V{clip // 8}"
            path = Path(f"/gone/clips of {patient}/Clip_P{patient}_C{clip}_part1.mp4")
            rows.append(ClipRow(path, label, patient, video, f"{video}_C{clip // 2}"))
            logits.append(rng.normal(0, 1.4, len(classes)) + (np.arange(len(classes)) == label) * 3)
            logits[-1] *= 1 + number / 12
    return Predictions(rows, temper(np.exp(np.array(logits)), 1.0))


def write_run(folder: Path, predictions: Predictions, classes: tuple[str, ...]) -> Path:
    """A run folder as train.py leaves it, with a patient's name in a path and a command."""
    predictions.unreadable[:] = ["a.mp4: no such file", "b.mp4: no such file"]
    facts = {"checkpoint": f"runs/{PATIENTS[0]}/best.pt", "epoch": 2, "split": "test"}
    facts["warnings"] = [LEAKAGE]
    calibration = Calibration(1.4, 0.1, 0.62)
    write_results(predictions, classes, folder, [calibration], facts)
    columns = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1")
    values = ((1.9, 0.3, 1.8, 0.35, 0.3), (1.2, 0.6, 1.3, 0.5, 0.52), (0.9, 0.8, 1.4, 0.5, 0.49))
    history = [
        {"epoch": number, **dict(zip(columns, row, strict=True))}
        for number, row in enumerate(values, 1)
    ]
    write_history(folder / "metrics.csv", history)
    write_json(
        folder / "config.json",
        {"model": "tsm", "data_root": f"/data/{PATIENTS[1]}", "batch_size": 16, "classes": classes},
    )
    command = f"python train.py --data-root /data/{PATIENTS[1]} --test-csv {PATIENTS[2]}.csv"
    session = {"command": command, "torch": "2.14.1", "device": "NVIDIA H100", "commit": "23b73c7+"}
    write_json(folder / "environment.json", {"sessions": [session]})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "20260101-120000_tsm"
    return write_run(folder, make_predictions(), CLASSES)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return make_page(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Hostile names, and frames of three clips: the page with the most in it, and where it is."""
    folder = tmp_path_factory.mktemp("hostile") / 'a "quoted" <folder>'
    predictions = make_predictions(HOSTILE)
    wrong = np.flatnonzero(~predictions.right)
    worst = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:3]
    for number, place in enumerate(worst):
        path = make_clip(folder / "clips" / f"<i>{number}.mp4", 200, frames=10, size=48)
        predictions.rows[place] = predictions.rows[place]._replace(path=path)
    write_run(folder, predictions, HOSTILE)
    text = make_page(folder, with_frames=True, with_patients=True)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html", text


def make_page(folder: Path, **settings: bool | int) -> str:
    return build_page(load_run(folder), ReportConfig(str(folder), **settings))


def results_of(folder: Path) -> dict:
    return json.loads((folder / "test_metrics.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page's elements, and its text as it is shown."""

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
        self.pieces.append(" " * (tag in ("td", "th", "title", "text")))  # else they run together

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
        ("Answered", f"{selective['coverage']:.1%}"),
        ("Wrong among answers", f"{selective['error']:.1%}"),
    ):
        assert f"{title} {value.replace('%', ' %')}" in text
    for kind, words in (("patients", "{} (95 % interval)"), ("clips", "independent: {}")):
        low, high = results["intervals"]["macro_f1"][kind]
        assert words.format(f"{low:.3f} to {high:.3f}") in text
    assert f"{results['clips']} clips of 12 patients, 7 classes" in text
    assert f"{100 * results['chance_accuracy']:.1f} %, from always answering the largest" in text
    for name in ("ece", "brier", "nll"):
        before, after = results["calibration"]["before"][name], results["calibration"][name]
        assert f"{before:.3f} {after:.3f}" in text
    assert f"{results['selective']['aurc']:.3f}" in text


def test_what_a_reader_must_know_stands_first(page: str) -> None:
    text = Page(page).text
    assert text.index("Missing clips. 2 of") < text.index("How well it does")
    assert text.index("Leakage. 4 of 12 patients") < text.index("How well it does")
    assert "Do not pass on" not in text


def test_an_absent_class_is_not_a_zero(page: str) -> None:
    text = Page(page).text
    assert "Suction no clips of this class in this split" in text
    assert "Suction absent from this split" in text


def test_the_table_holds_the_confusion_matrix(run: Path, page: str) -> None:
    table = page.split('<table class="confusion"')[1].split("</table>")[0]
    cells = re.findall(r'<td class="cell.*?</td>', table)
    counts = [int(re.search(r"<b>(\d+)|>(0)<", cell)[0].strip("<b>")) for cell in cells]
    matrix = load_run(run).predictions.confusion[:6]  # the last class has no clips
    assert counts == matrix.ravel().tolist()
    assert table.count('scope="row"') == 7
    assert table.count('scope="col"') == 9


def test_intervals_agree_with_bootstrap_where_they_overlap(tmp_path: Path) -> None:
    """With clips of one class only, its recall is the accuracy, and so is its interval."""
    predictions = make_predictions(("a", "b"), absent=1)
    write_results(predictions, ("a", "b"), tmp_path, [Calibration(1.0, 0.1, 0.8)])
    loaded = load_run(tmp_path)
    more = more_intervals(loaded)
    for kind in ("patients", "clips"):
        expected = loaded.results["intervals"]["accuracy"][kind]
        assert more["recall of a"][kind] == pytest.approx(expected)
    assert more["recall of b"] == {"patients": None, "clips": None}
    for values, estimate in (
        (more["ece"], loaded.results["calibration"]["ece"]),
        (more["coverage"], loaded.results["selective"]["coverage"]),
        (more["error"], loaded.results["selective"]["error"]),
    ):
        low, high = values["patients"]
        assert 0 <= low <= estimate <= high <= 1


def test_the_interval_of_the_ece_is_that_of_resampled_clips(run: Path) -> None:
    loaded = load_run(run)
    predictions, ece = loaded.predictions, loaded.results["calibration"]["ece"]
    patients = predictions.units("patient")
    order = bootstrap.canonical_order(predictions.labels, predictions.probabilities, patients)
    (weights,) = bootstrap.patient_weights(patients[order], 60)
    values = [
        metrics.expected_calibration_error(
            np.repeat(predictions.confidence[order], often),
            np.repeat(predictions.right[order], often),
        )
        for often in weights.astype(int)
    ]
    low, high = bootstrap.interval(np.array(values), 12)
    mirrored, _ = bootstrap.interval(2 * ece - np.array(values), 12)
    expected = [max(0, min(low, mirrored)), max(high, ece)]
    assert more_intervals(loaded, draws=60)["ece"]["patients"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("patients", "words"), [(0, "No patient is known for any clip"), (1, "come from one patient")]
)
def test_without_patients_there_is_no_interval(tmp_path: Path, patients: int, words: str) -> None:
    predictions = make_predictions(("a", "b"), patients=1, absent=9)
    if not patients:
        predictions.rows = [row._replace(patient=None, video=None) for row in predictions.rows]
    write_results(predictions, ("a", "b"), tmp_path, [Calibration()])
    text = Page(make_page(tmp_path)).text
    assert words in text
    assert "no interval worth the name" in text
    assert "no interval over patients" in text
    assert "(95 % interval)" not in text
    assert "There is no metrics.csv here" in text
    assert "There is no config.json here" in text
    assert "None was chosen, so every clip is answered" in text


def secrets_of(folder: Path) -> set[str]:
    rows = load_run(folder).predictions.rows
    names = {name for row in rows for name in (row.patient, row.video, row.action)}
    return names | {text for r in rows for text in (str(r.path), r.path.name, r.path.stem)}


def test_nobody_is_named_by_default(run: Path, page: str) -> None:
    shown = page + html.unescape(page)
    assert not [secret for secret in secrets_of(run) if secret in shown]
    assert HIDDEN in page
    assert re.search(r"clip \d+ of patient \d+", page)
    assert "data:image" not in page
    assert "batch_size" in page
    assert "NVIDIA H100" in page


def test_names_are_shown_on_request_and_said_to_be_there(run: Path) -> None:
    page = make_page(run, with_patients=True)
    shown = html.unescape(page)
    assert all(patient in shown for patient in PATIENTS)
    assert shown.count("Clip_PKovacs") == 12  # the worst mistakes
    assert HIDDEN not in page
    text = Page(page).text
    assert "Do not pass on. This page contains patient identifiers." in text
    assert "<title>CONFIDENTIAL" in page
    assert "data:image" not in page


def test_the_numbers_of_patients_tell_their_accuracy_only(run: Path, page: str) -> None:
    predictions = load_run(run).predictions
    units = predictions.units("patient")
    accuracies = sorted(float(predictions.right[units == name].mean()) for name in PATIENTS)
    found = re.findall(r"patient (\d+): ([\d.]+)\u00a0% of \d+ clips right", page)
    assert found == [(str(n), f"{100 * value:.1f}") for n, value in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("text", "secrets", "expected"),
    [
        ("--csv p/Clip_P058_V1.mp4", ["058"], f"--csv p/Clip_P{HIDDEN}_V1.mp4"),
        ("--seed 58 runs/10580_x", ["58", "058"], "--seed 58 runs/10580_x"),
        ("/data/Anna/x", ["anna"], f"/data/{HIDDEN}/x"),
        ("/data/Annabel/x", ["Anna"], "/data/Annabel/x"),
        ("--model r2plus1d a_2.csv", ["2"], f"--model r2plus1d a_{HIDDEN}.csv"),
        ("open 'A B.mp4' now", ["A B.mp4", "A B"], f"open '{HIDDEN}' now"),
        ("a.b+c", ["a.b+c", "b"], HIDDEN),
        ("nothing", [], "nothing"),
    ],
)
def test_names_are_cut_out_of_what_was_typed(text: str, secrets: list[str], expected: str) -> None:
    assert hide(text, secrets) == expected


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


def test_frames_are_shown_on_request_and_said_to_be_there(hostile: tuple[Path, str]) -> None:
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
    assert "tsm: results on the validation clips" in text
    assert "Not a test." in text
    assert "kept: epoch 2" in text
    assert "NVIDIA H100" in text


def test_a_cross_validation_has_a_line_a_fold(run: Path, tmp_path: Path) -> None:
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
    assert "tsm: results out of 3 folds" in text
    lines = re.findall(r"<title>(fold\d+) training</title>", page)
    assert lines == ["fold1", "fold2", "fold10"]
    assert page.count("epoch 2 was kept") == 2 * 3  # on the loss and on the scores
    assert "fold1 70 3 0.610" in text
    assert "the threshold of its fold’s model" in text
    assert "Each model has a temperature of its own" in text


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


def test_results_that_cannot_be_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    shutil.copytree(run, tmp_path / "run" / "evaluate_test")
    with pytest.raises(UserError, match="there are results in evaluate_test"):
        load_run(tmp_path / "run")
    folder = tmp_path / "run" / "evaluate_test"
    results = results_of(run)
    write_json(folder / "test_metrics.json", {**results, "clips": 3})
    with pytest.raises(UserError, match="are not of the same test"):
        load_run(folder)
    write_json(folder / "test_metrics.json", {"accuracy": 0.5})
    with pytest.raises(UserError, match="earlier version"):
        load_run(folder)
    (folder / "test_metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        load_run(folder)


NAMELESS = """() => [...document.querySelectorAll("svg")].filter(
  svg => svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")
    || svg.querySelector("title")?.textContent !== svg.getAttribute("aria-label")).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, hostile: tuple[Path, str], scheme: str) -> None:
    """Nothing runs, nothing is loaded, nothing sticks out, everything can be read."""
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
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
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


def test_on_paper_it_is_light_and_whole(browser, hostile: tuple[Path, str]) -> None:
    tab = browser.new_page(viewport={"width": 690, "height": 1000})
    tab.emulate_media(media="print", color_scheme="dark")
    tab.goto(hostile[0].as_uri())
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(24, 32, 43)"
    hidden = """[...document.querySelectorAll("details > :not(summary)")].filter(
      one => !one.checkVisibility({contentVisibilityAuto: true})).length"""
    assert tab.evaluate(hidden) == 0
    wide = "Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))"
    assert tab.evaluate(wide) <= 690
    tab.close()
