"""The comparison of models: what is trained, which learning rate is kept, the table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import models
from clips.manifest import ClipRow
from evaluation.predictions import Predictions

LABELS = np.array([0, 0, 1, 0] * 4)


def predictions(wrong: int) -> Predictions:
    """16 clips of four patients, of which the first ones are wrong."""
    rows = [ClipRow(Path(f"{i:02d}.mp4"), int(y), f"p{i // 4}") for i, y in enumerate(LABELS)]
    answers = np.where(np.arange(16) < wrong, 1 - LABELS, LABELS)
    return Predictions(rows, np.where(np.arange(2) == answers[:, None], 0.9, 0.1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, which make what the real ones make: the larger learning rate is better for
    vivit, the smaller one for mvit; shuffled frames cost vivit four clips."""
    made = []

    def call(script: str, *flags: str) -> None:
        made.append([script, *flags])
        if script == "train.py":
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            run = Path(given["--run-dir"]) / "run"
            run.mkdir(parents=True)
            rate = float(given["--learning-rate"])
            score = rate if given["--model-name"] == "vivit" else -rate
            scores = {"val_macro_f1": [score, 0.5 + score, score]}
            pd.DataFrame(scores).to_csv(run / "metrics.csv")
            (run / "test_metrics.json").write_text("{}")
        else:
            (Path(flags[-1])).mkdir()
            (Path(flags[-1]) / "predictions.csv").touch()

    def read(folder: Path) -> Predictions:
        seed = int(str(folder).removesuffix("/shuffled").removesuffix("/run")[-1])
        return predictions(seed + 4 * ("vivit" in str(folder) and folder.name == "shuffled"))

    monkeypatch.setattr(models, "_call", call)
    monkeypatch.setattr(models, "_predictions", read)
    return made


def test_the_budget_is_equal_and_the_table_by_hand(calls: list, tmp_path: Path) -> None:
    config = models.ModelsConfig(("vivit", "mvit"), (1e-3, 1e-4), (0, 1), output=str(tmp_path))
    table = models.compare_models(config).set_index("model")
    trained = [tuple(call[2:7:2]) for call in calls if call[0] == "train.py"]
    assert trained == [
        *(("vivit", "0.001", "0"), ("vivit", "0.0001", "0"), ("vivit", "0.001", "1")),
        *(("mvit", "0.001", "0"), ("mvit", "0.0001", "0"), ("mvit", "0.0001", "1")),
    ]
    assert all("--shuffle-frames" in call for call in calls if call[0] == "evaluate.py")
    assert table["learning rate"].tolist()[1:] == [1e-3, 1e-4]
    assert table.loc["majority class", "accuracy"] == 0.75
    assert table.loc["vivit", "accuracy"] == pytest.approx((1 + 15 / 16) / 2)
    assert table.loc["vivit", "shuffled: accuracy delta"] == pytest.approx(-4 / 16)
    assert table.loc["vivit", "shuffled: accuracy delta high"] <= 0
    assert table.loc["mvit", "shuffled: accuracy delta"] == 0

    done = len(calls)
    assert models.compare_models(config).set_index("model").equals(table)
    assert len(calls) == done  # nothing is trained or tested twice
    (tmp_path / "mvit-0.0001-1" / "run" / "test_metrics.json").unlink()
    (tmp_path / "mvit-0.0001-1" / "run" / "last.pt").touch()
    with pytest.raises(KeyError):  # the real train.py would finish it; this one knows no --resume
        models.compare_models(config)
    assert calls[-1][1:] == ["--resume", str(tmp_path / "mvit-0.0001-1" / "run")]
