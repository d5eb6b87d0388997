"""predict.py --clips: one answer per clip, the same probabilities as evaluate.py."""

import csv
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, tiny_config
from torch import nn

from checkpoint import load_checkpoint, save_checkpoint
from clips.manifest import ClipRow, read_manifest
from evaluate import main as evaluate_main
from evaluation.clip_answers import ClipAnswer, describe_answers, write_answers
from evaluation.novelty import NoveltyReference, class_means, distance_to_means
from modeling.features import last_layer
from modeling.inference import prepare_for_inference
from models import MODELS
from predict import main
from training.engine import evaluate
from training.loaders import eval_loader
from training.novelty import measure_class_means, some_per_class
from utils.tables import read_table

CLASSES = ("dark", "grey", "light")
PROBABILITIES = [f"p_{name}" for name in CLASSES]
FLAGS = ("--num-workers", 0)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A run folder of this file's own, because evaluate.py writes into it."""
    return Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("predicted") / "run"))


def read(path: Path) -> list[dict[str, str]]:
    return [row for _, row in read_table(path, ",").records(str)]


@pytest.mark.parametrize("views", [{}, {"test_views": 2, "test_crops": 3}])
def test_the_probabilities_are_those_of_evaluate(
    views: dict, run: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    """Also where the run averages views, and with one clip that cannot be read."""
    state = torch.load(run / "best.pt", weights_only=True)
    state["config"] |= views
    save_checkpoint(tmp_path / "best.pt", state)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(tiny_data / "clips" / "test", data / "test")
    shutil.copy(tiny_data / "test.csv", data)
    (data / "test" / "1_1.mp4").write_bytes(b"no video")

    more = ("--csv", data / "test.csv", "--data-root", data, "--skip-unreadable", "--output", "e")
    run_main(evaluate_main, "best.pt", *more, *FLAGS, cwd=tmp_path)
    arguments = ("best.pt", data / "test.csv", "--clips", "out/answers.csv", *FLAGS)
    ended = run_main(main, *arguments, cwd=tmp_path, code=2)

    evaluated = pd.read_csv(tmp_path / "e" / "predictions.csv")
    answers = pd.read_csv(tmp_path / "out" / "answers.csv")
    listed = pd.read_csv(data / "test.csv")["path"]
    assert list(answers["path"]) == [str(data / path) for path in listed]  # all, in order
    readable = answers[answers["answer"] != "unreadable"]
    assert len(readable) == len(answers) - 1 == 8
    assert list(readable["path"]) == list(evaluated["path"])
    assert np.abs(readable[PROBABILITIES].values - evaluated[PROBABILITIES].values).max() == 0.0
    assert list(readable["answer"]) == list(evaluated["decision"])
    assert list(readable["likeliest"]) == list(evaluated["prediction"])
    assert (readable["confidence"] == readable[PROBABILITIES].max(axis=1)).all()
    (unreadable,) = read(tmp_path / "out" / "answers.csv")[4:5]
    assert unreadable["path"].endswith("1_1.mp4")
    assert [unreadable[name] for name in ("likeliest", "confidence", "novelty")] == [""] * 3
    assert [unreadable[name] for name in PROBABILITIES] == [""] * 3
    assert "error: 1 of 9 clips could not be read (see above)" in ended.stderr
    assert f"error: {data}/test/1_1.mp4: cannot be read" in ended.stderr


def test_the_summary_counts_every_answer(
    run: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    folder = tiny_data / "clips" / "val"
    single = tiny_data / "clips" / "test" / "0_0.mp4"
    sources = (single, folder, tiny_data / "val.csv", single)  # the same clips twice
    ended = run_main(main, run, *sources, "--clips", "a.csv", *FLAGS, cwd=tmp_path)
    rows = read(tmp_path / "a.csv")
    assert [row["path"] for row in rows] == [str(single), *map(str, sorted(folder.iterdir()))]
    for label in {row["answer"] for row in rows}:
        count = sum(row["answer"] == label for row in rows)
        assert any(line.split() == [label, str(count)] for line in ended.stdout.splitlines())
    assert "9 validation clips are too few to call a clip novel" in ended.stdout
    assert "answers: a.csv" in ended.stdout

    # the validation clips themselves have all ranks from 0 to 8 of 10; batches of another size may
    # round a distance to the other side of its own
    novelty = np.array(sorted(float(row["novelty"]) for row in rows[1:]))
    wrong = np.abs(novelty - np.arange(9) / 10)
    assert wrong.max() < 0.1001
    assert (wrong > 1e-6).sum() <= 3

    always = ("--clips", "b.csv", "--target-error", 1)
    run_main(main, run, folder, *always, *FLAGS, cwd=tmp_path)
    assert all(row["answer"] == row["likeliest"] for row in read(tmp_path / "b.csv"))


def test_novel_clips_are_counted(
    run: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    state = torch.load(run / "best.pt", weights_only=True)
    state["novelty"]["distances"] = [3.0] * 2 + [-1.0] * 98
    save_checkpoint(tmp_path / "best.pt", state)
    arguments = ("best.pt", tiny_data / "clips" / "test", "--clips", "a.csv", *FLAGS)
    ended = run_main(main, *arguments, cwd=tmp_path)
    assert "9 of 9 clips look novel: more unusual than 95% of the" in ended.stdout
    assert {row["novelty"] for row in read(tmp_path / "a.csv")} == {"0.97029703"}  # 98 of 101


def test_an_old_checkpoint_says_how_to_get_the_novelty(
    trained, run_main: Callable, tmp_path: Path, tiny_data: Path, no_figures
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "an old run"))
    state = load_checkpoint(run)
    stored = state.pop("novelty")
    save_checkpoint(run / "best.pt", state)
    clips = tiny_data / "clips" / "test"
    arguments = (run, clips, "--clips", "a.csv", *FLAGS)
    ended = run_main(main, *arguments, cwd=tmp_path)
    assert {row["novelty"] for row in read(tmp_path / "a.csv")} == {""}
    (line,) = [line for line in ended.stdout.splitlines() if "novelty" in line]
    command = line.partition("python train.py ")[2].partition(" adds that")[0]

    from train import main as train_main

    run_main(train_main, *shlex.split(command), cwd=tmp_path)
    fitted = load_checkpoint(run)["novelty"]
    assert fitted["distances"] == stored["distances"]
    assert torch.equal(fitted["means"], stored["means"])
    run_main(main, *arguments, cwd=tmp_path)
    assert all(row["novelty"] for row in read(tmp_path / "a.csv"))


def test_nothing_can_be_read(run: Path, run_main: Callable, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    ended = run_main(main, run, ".", "--clips", "c.csv", *FLAGS, cwd=tmp_path, code=2)
    assert [row["answer"] for row in read(tmp_path / "c.csv")] == ["unreadable"] * 2
    assert "2 of 2 clips could not be read" in ended.stderr
    assert ended.stderr.count("error: ") == 3


def test_no_other_file_is_replaced(
    run: Path, tiny_data: Path, mistake: Callable, run_main: Callable, tmp_path: Path
) -> None:
    """--clips names the output: a manifest of that name, or any other file, stays as it is."""
    clip = tiny_data / "clips" / "test" / "0_0.mp4"
    manifest = tmp_path / "t.csv"
    manifest.write_text(text := f"path,label\n{clip},dark\n")
    (tmp_path / "link.csv").hardlink_to(manifest)
    (tmp_path / "answers.csv").write_text("path,answers\nmine\n")
    shutil.copy(run / "predictions.csv", tmp_path / "predictions.csv")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    commands = {
        "no source: name video files, folders or manifests": ["t.csv"],
        "--clips t.csv: exists already, is not a table that this": ["t.csv", clip],
        "--clips link.csv: exists already": ["link.csv", manifest],
        "--clips answers.csv: exists already": ["answers.csv", manifest],
        "--clips predictions.csv: exists already": ["predictions.csv", manifest],
    }
    for message, (output, *sources) in commands.items():
        ended = mistake(main, run, *sources, "--clips", output, *FLAGS, cwd=tmp_path)
        (line,) = ended.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert manifest.read_text() == text
    mistake(main, run, "--clips", "new.csv", *FLAGS, cwd=tmp_path)
    assert not (tmp_path / "new.csv").exists()

    (tmp_path / "own.csv").touch()  # nothing is lost
    run_main(main, run, manifest, "--clips", "own.csv", *FLAGS, cwd=tmp_path)
    run_main(main, run, clip.parent, "--clips", "own.csv", *FLAGS, cwd=tmp_path)
    assert len(read(tmp_path / "own.csv")) == 9


def test_hostile_names_are_harmless_in_the_table(tmp_path: Path) -> None:
    names = ["=1+1.mp4", "@x", 'a,b\n"c".mp4', "-2", "қол.mp4"]
    classes = ("=cmd()", "+plus", "Қысқыш")
    answers = [
        ClipAnswer(Path(n), classes[0], classes[1], 0.5, 0.25, (0.5, 0.25, 0.25)) for n in names
    ]
    write_answers(tmp_path / "a.csv", answers, classes)
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    formulas = [cell for cell in cells if cell[:1] in "=+@" and cell]
    assert formulas == []
    rows = read(tmp_path / "a.csv")
    assert [row["path"] for row in rows] == names
    assert {(row["answer"], row["likeliest"], row["p_Қысқыш"]) for row in rows} == {
        ("=cmd()", "+plus", "0.25")
    }


def reference(clips: int) -> NoveltyReference:
    return NoveltyReference(torch.ones(1, 1).double(), (0.0,) * clips)


def test_the_summary_names_novel_clips() -> None:
    answers = [ClipAnswer(Path(f"{i}"), "a", "a", 0.9, i / 100, (0.9, 0.1)) for i in range(100)]
    text = describe_answers(answers, reference(30), "run")
    assert "4 of 100 clips look novel" in text  # 0.96 to 0.99
    assert "19 validation clips are too few" in describe_answers(answers, reference(19), "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.mp4", "--clips", "a.csv"], "gone.mp4: no such file"),
        (["0", "--clips", "a.csv"], "0: no such file; --clips takes video files, folders and"),
        ([".", "--clips", "a.csv"], "holds no video"),
        (["m.csv", "--clips", "./m.csv"], "is one of the sources"),
        (["m.csv", "--clips", "a.mp4"], "give the name of a .csv file"),
        (["m.csv", "--clips", "a.csv", "--serve"], "--serve is for whole videos"),
        (["m.csv", "--clips", "a.csv", "--fps", "3"], "--fps is for whole videos"),
        (["m.csv", "--clips", "a.csv", "--overlay"], "--overlay is for whole videos"),
        (["m.csv", "--clips", "a.csv", "--target-error", "2"], "must be from 0 to 1"),
        (["m.csv", "--clips", "a.csv", "--num-workers", "-1"], "num_workers = -1"),
        (["gone.csv", "--clips", "a.csv"], "gone.csv: no such manifest"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    run: Path,
    tiny_data: Path,
    mistake: Callable,
    tmp_path: Path,
) -> None:
    (tmp_path / "m.csv").write_text(f"path,label\n{tiny_data}/clips/test/0_0.mp4,dark\n")
    ended = mistake(main, run, *arguments, cwd=tmp_path)
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "a.csv").exists()
    assert (tmp_path / "m.csv").read_text().startswith("path,label")


@pytest.mark.parametrize("header", ["path\n", ""])
def test_evaluate_names_the_command_for_a_manifest_without_labels(
    header: str, run: Path, tiny_data: Path, mistake: Callable, run_main: Callable, tmp_path: Path
) -> None:
    clips = sorted((tiny_data / "clips" / "test").iterdir())
    manifest = tmp_path / "new clips.csv"
    manifest.write_text(header + "".join(f"{path.name}\n" for path in clips))
    root = ("--data-root", clips[0].parent)
    ended = mistake(evaluate_main, run, "--csv", manifest, *root, *FLAGS, cwd=tmp_path)
    (line,) = ended.stderr.splitlines()
    assert f"{manifest}: has no labels" in line
    script, *arguments = shlex.split(line[line.index("python predict.py") :])[1:]
    assert script == "predict.py"
    run_main(main, *arguments, *FLAGS, cwd=tmp_path)
    rows = read(tmp_path / "new clips_answers.csv")
    assert [row["path"] for row in rows] == list(map(str, clips))


@pytest.mark.parametrize("name", MODELS)
def test_distances_are_those_of_the_last_layers_input(name: str, tiny_data: Path) -> None:
    """Against a forward pass whose last layer is replaced by the identity."""
    config = tiny_config(tiny_data, model_name=name)
    torch.manual_seed(0)
    model = make_model(name, 3, n_frames=4, image_size=32)
    rows = read_manifest(tiny_data / "test.csv", classes=CLASSES)
    cpu = torch.device("cpu")
    means = measure_class_means(model, rows, config, cpu)
    predictions = evaluate(model, eval_loader(rows, config), cpu, means=means)

    bare = prepare_for_inference(model, cpu)
    bare.set_submodule(
        next(n for n, module in bare.named_modules() if module is last_layer(bare)), nn.Identity()
    )
    clips = torch.stack([eval_loader(rows, config).dataset[i][0] for i in range(len(rows))])
    with torch.inference_mode():  # a consensus averages what it gets
        features = bare(clips).double().reshape(len(rows), -1, means.shape[1]).mean(1)
    expected_means = class_means(features, torch.tensor([row.label for row in rows]))
    assert torch.allclose(means, expected_means, atol=1e-6)
    assert np.allclose(predictions.distance, distance_to_means(features, expected_means), atol=1e-6)


def test_some_rows_of_each_class() -> None:
    rows = [ClipRow(Path(str(i)), i % 2) for i in range(202)] + [ClipRow(Path("x"), 2)]
    chosen = some_per_class(rows, 5)
    assert [row.path.name for row in chosen] == (
        ["0", "50", "100", "150", "200", "1", "51", "101", "151", "201", "x"]
    )
