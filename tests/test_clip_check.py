"""prepare_data.py check: the list of bad files, on made and on real ones."""

from pathlib import Path

import numpy as np
import pandas as pd
from conftest import make_clip, run_script

from clip_check import CheckConfig, check
from video import check_video, write_video


def test_bad_files_are_listed_with_reasons(tmp_path: Path) -> None:
    for number in range(3):
        make_clip(tmp_path / f"clips/good{number}.mp4", 100, seed=number)
    whole = (tmp_path / "clips/good0.mp4").read_bytes()
    (tmp_path / "clips/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "clips/text.mp4").write_text("not a video")
    (tmp_path / "all.csv").write_text(
        "path,label\n" + "".join(f"{n}.mp4,x\n" for n in ("good0", "good1", "cut", "text", "gone"))
    )
    done = run_script("prepare_data.py", "check", "all.csv", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "5 files, 3 of them bad: bad_clips.csv" in done.stdout
    table = pd.read_csv(tmp_path / "bad_clips.csv").set_index("path")["reason"]
    assert {Path(path).name for path in table.index} == {"cut.mp4", "text.mp4", "gone.mp4"}
    assert table["gone.mp4"] == "no such file"
    assert "gone.mp4" not in done.stdout  # names stay in the list


def test_good_files_pass(tiny_data: Path, tmp_path: Path, capsys) -> None:
    output = str(tmp_path / "new/bad.csv")
    assert check(CheckConfig((str(tiny_data),), output=output, workers=0)) == 0
    assert "36 files, 0 of them bad" in capsys.readouterr().out
    assert len(pd.read_csv(output)) == 0
    assert check(CheckConfig((str(tiny_data / "clips/val"),), output=output, workers=2)) == 0
    assert "9 files, 0 of them bad" in capsys.readouterr().out  # a folder of videos


def test_damage_where_no_sampling_looks_is_found(tmp_path: Path) -> None:
    """One picture of 40 is overwritten; every one is decoded."""
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, group=10)
    assert check_video(tmp_path / "clip.mp4") is None
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = b"\xff" * 3000
    (tmp_path / "clip.mp4").write_bytes(content)
    assert check_video(tmp_path / "clip.mp4") is not None


def test_real_files(real: Path, tmp_path: Path) -> None:
    sources = (str(real / "odd/not-a-video"), str(real / "cholect50/clips/preparation"))
    assert check(CheckConfig(sources, output=str(tmp_path / "bad.csv"), workers=2)) == 1
    bad = {Path(path).parent.name for path in pd.read_csv(tmp_path / "bad.csv")["path"]}
    assert bad == {"not-a-video"}
