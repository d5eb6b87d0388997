"""explain.py on a tiny run: which clips, which class, and what it writes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from checkpoint import load_checkpoint, rebuild_model
from clips.manifest import ClipRow
from config import from_dict
from explain import main, playback_rate, write_shortcuts
from explanation import pictures
from explanation.methods import explain
from explanation.relevance import ExplainedClip
from training.engine import evaluate
from training.loaders import eval_loader, load_splits

CLASSES = ("dark", "grey", "light")
FLAGS = ("--num-workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def run(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of this file's own."""
    return Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("explained") / "run"))


def test_the_most_confident_mistakes_and_right_answers(
    run: Path, run_main: Callable, tmp_path: Path
) -> None:
    done = run_main(main, run, "--method", "occlusion", *FLAGS, "--output", "out", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "out" / "relevance.csv", keep_default_na=False)
    clips = table.groupby("clip", sort=False).first()

    state = load_checkpoint(run)
    config = from_dict(state["config"])
    rows = load_splits(config)["test"]
    loader = eval_loader(rows, config)
    temperature = state["calibration"]["temperature"]
    predictions = evaluate(
        rebuild_model(state), loader, torch.device("cpu"), temperature=temperature
    )
    order = np.argsort(-predictions.confidence, kind="stable")
    wrong = [i for i in order if not predictions.correct[i]]
    right = [i for i in order if predictions.correct[i]]
    expected = [*wrong[:10], *right[:10]]
    assert f"{len(wrong)} of 9 test clips are classified wrongly" in done.stdout
    assert list(clips["name"]) == [str(rows[i].path) for i in expected]
    np.testing.assert_allclose(clips["confidence"], predictions.confidence[expected], atol=1e-4)
    assert list(clips["predicted"]) == [CLASSES[predictions.y_pred[i]] for i in expected]
    assert list(clips["label"]) == [CLASSES[rows[i].label] for i in expected]

    # The relevance is that of the function, frame by frame.
    clip = torch.stack([loader.dataset[i][0] for i in expected[:2]])
    targets = torch.from_numpy(predictions.y_pred[expected[:2]])
    relevance = explain(rebuild_model(state), clip, targets, "occlusion").frames
    written = table["relevance"].to_numpy(float)[:8].reshape(2, 4)
    np.testing.assert_allclose(written, relevance, atol=1e-4)
    for number in range(1, len(expected) + 1):
        assert (tmp_path / "out" / f"clip{number:03d}.png").stat().st_size > 5000
        assert (tmp_path / "out" / f"clip{number:03d}.mp4").stat().st_size > 500


def test_only_mistakes(run: Path, run_main: Callable, mistake: Callable, tmp_path: Path) -> None:
    done = run_main(main, run, "--right", 2, *FLAGS, "--output", "out", cwd=tmp_path)
    assert "explained: 2" in done.stdout
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    done = mistake(main, run, "--mistakes", 0, *FLAGS, cwd=tmp_path)
    assert "choose other numbers of --mistakes and --right" in done.stderr


def test_named_clips_have_no_label(
    run: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    clip = tiny_data / "clips" / "test" / "1_0.mp4"
    more = ("--target", "light", "--against", "dark", "--html", *FLAGS)
    run_main(main, run, clip, *more, cwd=tmp_path)
    (folder,) = run.glob("explain_clips_*")
    table = pd.read_csv(folder / "relevance.csv", keep_default_na=False)
    assert len(table) == 4 and set(table["name"]) == {str(clip)}
    assert set(table["explained"]) == {"light"} and set(table["against"]) == {"dark"}
    assert set(table["label"]) == {""}
    # 4 frames of 20 at 25 per second: the middles of four stretches of five
    np.testing.assert_allclose(table["time"].astype(float), np.array([2, 7, 12, 17]) / 25)
    page = (folder / "explanations.html").read_text(encoding="utf-8")
    assert "1_0" not in page and "light" in page


def test_a_class_is_not_compared_with_itself(run: Path, run_main: Callable, tmp_path: Path) -> None:
    """Among the chosen clips are some that are predicted as the class to compare with."""
    more = ("--method", "occlusion", "--right", 9, "--mistakes", 9, *FLAGS)
    run_main(main, run, *more, "--output", "alone", cwd=tmp_path)
    read = {"index_col": ["clip", "frame"], "keep_default_na": False}
    alone = pd.read_csv(tmp_path / "alone" / "relevance.csv", **read)
    name = alone["predicted"].iloc[0]
    run_main(main, run, *more, "--against", name, "--output", "compared", cwd=tmp_path)
    compared = pd.read_csv(tmp_path / "compared" / "relevance.csv", **read)
    same = compared["predicted"] == name
    assert same.any() and set(compared["against"][same]) == {""}
    assert set(compared["against"][~same]) <= {name}
    np.testing.assert_allclose(compared["relevance"][same], alone["relevance"][same], atol=1e-5)
    assert alone["relevance"][same].abs().max() > 1e-3


def test_short_cuts_are_a_table(run: Path, run_main: Callable, tmp_path: Path) -> None:
    more = ("--method", "occlusion", *FLAGS, "--output", "out")
    done = run_main(main, run, "--shortcut", *more, cwd=tmp_path)
    assert "9 of 9 clips are looked at" in done.stdout
    table = pd.read_csv(tmp_path / "out" / "shortcut.csv", keep_default_na=False)
    assert set(table["class"]) <= set(CLASSES)
    assert list(table["region"]) == ["border", "static"] * (len(table) // 2)
    border = table[table["region"] == "border"]
    # The border is 3 of 32 pixels on each side.
    np.testing.assert_allclose(border["area"].astype(float), 1 - (26 / 32) ** 2, atol=1e-4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shortcut.csv"}


@pytest.mark.parametrize("cells", [1, 16])
def test_what_was_not_measured_is_no_good_news(
    cells: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Maps of a single cell cannot tell a border from the rest."""
    rng = np.random.default_rng(0)
    rows = [ClipRow(Path(f"{number}.mp4"), 0, f"patient {number}") for number in range(4)]
    clips = [
        ExplainedClip(
            str(row.path), rng.integers(0, 256, (4, 32, 32, 3), np.uint8), np.arange(4.0),
            np.ones((4, cells, cells)), np.ones(4), "occlusion", "dark", 0.9, "dark", 0.9,
        )
        for row in rows
    ]  # fmt: skip
    write_shortcuts(tmp_path, iter(clips), CLASSES, rows)
    output = capsys.readouterr().out
    assert ("no sign of a shortcut" in output) == (cells == 16)
    assert ("could be measured: see the last column" in output) == (cells == 1)


def test_unreadable_clips_are_told_at_the_end(
    run: Path, tiny_data: Path, run_main: Callable, mistake: Callable, tmp_path: Path
) -> None:
    shutil.copy(tiny_data / "clips" / "test" / "1_0.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    more = ("--method", "rollout", "--output", "out", *FLAGS)
    done = run_main(main, run, "a.mp4", "b.mp4", *more, cwd=tmp_path, code=2)
    assert "1 clips could not be read (see above); the others are done" in done.stderr
    assert (tmp_path / "out" / "clip001.png").exists()
    done = mistake(main, run, "b.mp4", *more, cwd=tmp_path)
    assert "none of the clips can be read" in done.stderr


def test_pictures_of_an_earlier_call_do_not_stay(
    run: Path, run_main: Callable, tmp_path: Path
) -> None:
    more = (*FLAGS, "--output", "out")
    run_main(main, run, "--right", 2, "--html", *more, cwd=tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("of a person")
    run_main(main, run, "--right", 1, *more, cwd=tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"clip001.png", "clip001.mp4", "relevance.csv", "notes.txt"}


def test_clips_are_never_written_over(
    run: Path, tiny_data: Path, mistake: Callable, tmp_path: Path
) -> None:
    clip = shutil.copy(tiny_data / "clips" / "test" / "1_0.mp4", tmp_path / "clip001.mp4")
    before = clip.read_bytes()
    done = mistake(main, run, "clip001.mp4", "--output", ".", *FLAGS, cwd=tmp_path)
    assert "give another folder" in done.stderr
    assert clip.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_frames_of_clips_are_not_kept(
    run: Path, run_main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(pictures, "write_relevance", lambda _, clips: kept.extend(clips))
    run_main(main, run, "--right", 2, *FLAGS, "--output", "out", cwd=tmp_path)
    assert len(kept) == 2
    for clip in kept:  # an empty view would keep the array that it is a view of
        assert clip.frames.size == clip.maps.size == 0
        assert clip.frames.base is None and clip.maps.base is None


def test_an_unreadable_clip_of_a_manifest_does_not_stop_the_others(
    run: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data / "clips" / "test", data / "test")
    shutil.copy(tiny_data / "test.csv", data)
    (data / "test" / "1_1.mp4").write_bytes(b"no video")
    more = ("--csv", data / "test.csv", "--data-root", data, "--output", "out", "--mistakes", 1)
    done = run_main(main, run, *more, "--right", 1, *FLAGS, cwd=tmp_path, code=2)
    assert "of 8 test clips are classified wrongly" in done.stdout
    assert f"error: {data}/test/1_1.mp4: cannot be read" in done.stderr
    assert "1 clips could not be read (see above); the others are done" in done.stderr
    assert (tmp_path / "out" / "relevance.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target", "red"),
            "--target red: no class of this model: choose from dark, grey, light",
        ),
        (("--method", "rollout", "--target", "dark"), "rollout is the same for all classes"),
        (("a.mp4", "--csv", "a.csv"), "not both"),
        (("a.mp4", "--mistakes", 3), "choose among labelled clips"),
        (("a.mp4",), "no such file"),
        (("--target", "dark", "--against", "dark"), "is the target itself"),
        (("--shortcut", "--html"), "leave out"),
        (("--shortcut", "--mistakes", 5), "leave out --mistakes and --right"),
        (("--batch-size", 0), "at least 1"),
        (("--with-names",), "give --html too"),
        (("--mistakes", -1), "at least 0"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: tuple, message: str, run: Path, mistake: Callable, tmp_path: Path
) -> None:
    done = mistake(main, run, *arguments, *FLAGS, cwd=tmp_path)
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_rate_of_the_videos() -> None:
    assert playback_rate(np.arange(4) / 2) == 2
    assert playback_rate(np.arange(4) / 25) == 8
    assert playback_rate(np.full(4, np.nan)) == playback_rate(np.zeros(1)) == 8
    assert playback_rate(np.zeros(4)) == 8


def test_files_of_others_are_not_lost(
    run: Path, tiny_data: Path, mistake: Callable, run_main: Callable, tmp_path: Path
) -> None:
    clip, more = tiny_data / "clips" / "test" / "1_0.mp4", ("--method", "rollout", *FLAGS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip001.mp4").write_bytes(b"mine")
    done = mistake(main, run, clip, *more, "--output", "out", cwd=tmp_path)
    assert "holds clip001.mp4, and no relevance.csv of an earlier call" in done.stderr
    (tmp_path / "out" / "relevance.csv").write_text("mine,too\n")
    done = mistake(main, run, clip, *more, "--output", "out", cwd=tmp_path)
    assert "is not a table that this command wrote" in done.stderr
    assert (tmp_path / "out" / "clip001.mp4").read_bytes() == b"mine"
    for _ in range(2):  # into a folder of its own as often as one likes
        run_main(main, run, clip, *more, "--output", "own", cwd=tmp_path)
