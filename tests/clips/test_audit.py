"""prepare_data.py audit: every kind of overlap, on names alone and on real files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import run_script

from clips.audit import KINDS, AuditConfig, _print_overlaps, audit, composition, overlaps
from clips.clip_table import read_clips
from clips.manifest_formats import ManifestOptions
from demo.data import Clip, render
from prepare_data import main
from utils.tables import read_table
from video.encoder import write_video


def named(patient: str, video: int, action: int, label: str, part: int = 1) -> str:
    return f"{patient}/Clip_P{patient}_V{video:03d}_C{action}_{label}_part{part}.mp4"


def manifest(path: Path, clips: list[tuple[str, str]]) -> Path:
    pd.DataFrame(clips, columns=["path", "label"]).to_csv(path)
    return path


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Names alone: patient 007 in train and test, one of his videos too, one of its actions too."""
    manifest(
        tmp_path / "train.csv",
        [
            (named("007", 1, 1, "HookCut", 1), "HookCut"),
            (named("007", 1, 1, "HookCut", 2), "HookCut"),
            (named("007", 2, 5, "NeedleIn"), "Needle"),
            (named("008", 1, 1, "Suction"), "Suction"),
        ],
    )
    manifest(tmp_path / "val.csv", [(named("009", 1, 1, "Suction"), "Suction")])
    manifest(
        tmp_path / "test.csv",
        [
            (named("007", 1, 1, "HookCut", 3), "HookCut"),
            (named("007", 3, 1, "NeedleOut"), "Needle"),
            (named("010", 1, 1, "Suction"), "Suction"),
        ],
    )
    return tmp_path


def test_composition_counts_clips_patients_videos_and_actions(leaky: Path) -> None:
    table = composition(read_clips([leaky])).set_index(["class", "split"])
    row = ["clips", "patients", "videos", "actions"]
    assert table.loc[("HookCut", "train"), row].tolist() == [2, 1, 1, 1]
    assert table.loc[("Suturing", "train"), row].tolist() == [1, 1, 1, 1]  # Needle, in SLAM's words
    assert table.loc[("(all)", "train"), row].tolist() == [4, 2, 3, 3]
    assert table.loc[("Suction", "val"), row].tolist() == [1, 1, 1, 1]
    assert table.loc[("HookCut", "val"), row].tolist() == [0, 0, 0, 0]
    assert table.loc[("(all)", "(all)"), row].tolist() == [8, 4, 6, 6]


def test_overlaps_are_found_and_counted(leaky: Path) -> None:
    table = overlaps(read_clips([leaky]), names=True)
    assert table["kind"].tolist() == ["patient", "video", "action"]
    assert table["unit"].tolist() == ["007", "007_V001", "007_V001_C1"]
    assert table[["train", "val", "test"]].to_numpy().tolist() == [[3, 0, 2], [2, 0, 1], [2, 0, 1]]
    assert table["lines"][2] == "train.csv:2 train.csv:3 test.csv:2"


def test_leakage_ends_with_exit_code_one_and_names_nobody(
    leaky: Path, tmp_path: Path, run_main
) -> None:
    done = run_script("prepare_data.py", "audit", leaky, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert "patients: 1 of 4 train and test share 1, with 3 clips of train and 2 of test" in said
    assert "videos: 1 of 6" in said
    assert "source actions: 1 of 6" in said
    assert "files: 0 of 8 exist" in said
    assert "LEAKAGE" in said
    folder = tmp_path / f"runs/audit_{leaky.name}"
    written = "".join(path.read_text() for path in folder.glob("*.csv"))
    assert {path.name for path in folder.iterdir()} == {"composition.csv", "overlaps.csv"}
    assert "007" not in done.stdout + written
    assert "patient 1" in written
    arguments = ("audit", leaky, "--names", "--output", tmp_path / "named")
    run_main(main, *arguments, cwd=tmp_path, code=1)
    assert "007_V001_C1" in (tmp_path / "named/overlaps.csv").read_text()


def test_files_are_compared_by_content_and_by_perceptual_hash(tmp_path: Path, capsys) -> None:
    """The same bytes under another name; the same pictures in other bytes; black clips."""
    frames = render(Clip("train", 3, 1, 1, 1, "HookCut"))
    (tmp_path / "clips").mkdir()
    for name, clip in {
        "a": frames,
        "brighter": np.clip(frames * 1.1, 0, 255).astype(np.uint8),
        "b": render(Clip("train", 4, 1, 1, 1, "PanoView")),
        "black": np.zeros_like(frames),
        "dark": np.full_like(frames, 2),
        "c": render(Clip("train", 9, 1, 1, 1, "Suction")),
    }.items():
        write_video(tmp_path / "clips" / f"{name}.mp4", clip)
    shutil.copy(tmp_path / "clips/b.mp4", tmp_path / "clips/copy.mp4")
    (tmp_path / "clips/broken.mp4").write_bytes(b"not a video")
    manifest(tmp_path / "train.csv", [(f"{n}.mp4", "x") for n in ("a", "b", "black", "broken")])
    manifest(tmp_path / "test.csv", [(f"{n}.mp4", "x") for n in ("brighter", "copy", "dark", "c")])
    config = AuditConfig((str(tmp_path),), output=str(tmp_path / "out"), num_workers=0)
    assert audit(config) == 1
    said = capsys.readouterr().out
    assert "files: 8 of 8 exist" in said
    assert "1 files cannot be read" in said
    assert "2 clips are almost uniform (black, white): only their bytes are compared" in said
    assert "the patient of 8 clips is unknown" in said
    found = pd.read_csv(tmp_path / "out/overlaps.csv")
    assert found["kind"].tolist() == ["content", "near_duplicate"]
    assert found["lines"].tolist() == ["train.csv:3 test.csv:3", "train.csv:2 test.csv:2"]
    facts = pd.read_csv(tmp_path / "out/files.csv").set_index("split")
    assert facts.loc["train", "files"] == 3
    assert facts.loc["test", "size"] == "128x96 (4)"
    assert facts.loc["test", "fps"] == "25 (4)"
    assert facts.loc["test", "seconds"] == pytest.approx(1.2)
    without = AuditConfig((str(tmp_path),), output=str(tmp_path / "names"), contents=False)
    assert audit(without) == 3
    said = capsys.readouterr().out
    assert "NOTHING WAS COMPARED: no patient is known, and no file was read" in said
    assert "no leakage" not in said


def test_clean_splits_pass(tiny_data: Path, tmp_path: Path, capsys) -> None:
    config = AuditConfig((str(tiny_data),), output=str(tmp_path), contents=False)
    assert audit(config) == 0
    said = capsys.readouterr().out
    assert "patients: 0 of 6\n" in said
    assert "no leakage found: the patients of 36 of 36 clips were compared" in said


def audited(folder: Path, **settings: bool) -> int:
    output = str(folder.parent / "out")
    return audit(AuditConfig((str(folder),), output=output, num_workers=0, **settings))


def test_the_verdict_says_what_was_compared(tmp_path: Path, capsys) -> None:
    """Three splits of one clip each, first without their files, then with two, then with all."""
    splits = ("train", "val", "test")
    actions = ("HookCut", "PanoView", "Suction")
    for split, patient in zip(splits, ("p1", "p2", ""), strict=True):
        (tmp_path / f"{split}.csv").write_text(f"path,label,patient\n{split}.mp4,x,{patient}\n")
    assert audited(tmp_path) == 3
    said = capsys.readouterr().out
    assert (
        "NOT EVERYTHING WAS COMPARED: no leakage found, but only the patients of 2 and the "
        "files of 0 of 3 clips were compared" in said
    )
    assert "patients: 0 of 2 (known for 2 of 3 clips)" in said
    assert "identical files: unknown" in said
    for number, (split, action) in enumerate(zip(splits, actions, strict=True)):
        write_video(tmp_path / f"{split}.mp4", render(Clip("train", number, 1, 1, 1, action))[:8])
    (tmp_path / "test.csv").write_text("path,label,patient\ntest.mp4,x,p3\n")
    whole = (tmp_path / "test.mp4").read_bytes()
    (tmp_path / "test.mp4").write_bytes(whole[:2000])
    assert audited(tmp_path) == 3
    assert "only the patients of 3 and the files of 2 of 3 clips" in capsys.readouterr().out
    (tmp_path / "test.mp4").write_bytes(whole)
    assert audited(tmp_path) == 0
    assert (
        "no leakage found: the patients of 3 and the files of 3 of 3 clips were compared"
        in capsys.readouterr().out
    )
    (tmp_path / "test.mp4").unlink()
    assert audited(tmp_path, contents=False) == 0
    assert "no leakage found: the patients of 3 of 3 clips" in capsys.readouterr().out


def test_leakage_is_told_even_if_not_everything_was_compared(tmp_path: Path, capsys) -> None:
    rows = "a.mp4,x,p1,train\nb.mp4,x,p1,test\nc.mp4,x,,test\n"
    (tmp_path / "m.csv").write_text("path,label,patient,split\n" + rows)
    assert audited(tmp_path / "m.csv") == 1
    assert "LEAKAGE" in capsys.readouterr().out


def test_without_readable_files_nothing_is_called_clean(tmp_path: Path, capsys) -> None:
    """Two folders of files that are no videos, whose patients nobody knows."""
    for split in ("train", "test"):
        (tmp_path / split / "cut").mkdir(parents=True)
        (tmp_path / split / "cut/a.mp4").write_text(f"no video: {split}")
    sources = (str(tmp_path / "train"), str(tmp_path / "test"))
    assert audit(AuditConfig(sources, output=str(tmp_path / "out"), num_workers=0)) == 3
    said = capsys.readouterr().out
    assert "2 files cannot be read" in said
    assert "NOTHING WAS COMPARED: no patient is known, and no file was read" in said


def test_a_split_column_is_one_only_if_it_names_splits(tmp_path: Path) -> None:
    rows = "loop_path,phase\n" + "".join(
        f"{named('00' + str(i), 1, 1, 'HookCut')},{s}\n" for i, s in enumerate(("train", "Test"))
    )
    (tmp_path / "looped.csv").write_text(rows)
    clips = read_clips([tmp_path / "looped.csv"])
    assert clips["split"].tolist() == ["train", "test"]
    assert clips["label"].tolist() == ["HookCut", "HookCut"]  # of the file name: no label column
    (tmp_path / "phases.csv").write_text("path,label,phase\na.mp4,x,dissection\nb.mp4,y,test\n")
    assert read_clips([tmp_path / "phases.csv"])["split"].tolist() == ["phases", "phases"]
    (tmp_path / "both.csv").write_text("path,label,split\na.mp4,x,validation\nb.mp4,y,train\n")
    assert read_clips([tmp_path / "both.csv"])["split"].tolist() == ["val", "train"]


def test_the_list_of_looped_clips_is_counted(leaky: Path, tmp_path: Path, capsys) -> None:
    lines = [named("007", 1, 1, "HookCut", 2), named("010", 1, 1, "Suction"), "elsewhere.mp4"]
    (leaky / "looped.csv").write_text("loop_path,phase\n" + "".join(f"{p},train\n" for p in lines))
    folder = str(tmp_path / "out")
    audit(AuditConfig((str(leaky),), looped=str(leaky / "looped.csv"), output=folder))
    table = pd.read_csv(tmp_path / "out/looped.csv", index_col=0)
    assert table.loc["HookCut", "train"] == table.loc["Suction", "test"] == 1
    assert table.loc["(all)", "(all)"] == 2


def test_patient_pattern_and_folders_of_videos(tmp_path: Path) -> None:
    for name in ("cut/VID1_a.mp4", "cut/VID2_a.mp4", "sew/VID1_b.mp4", "sew/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = read_clips([tmp_path], options=ManifestOptions(patient_pattern=r"VID(\d)_"))
    assert clips["label"].tolist() == ["cut", "cut", "sew"]
    assert clips["patient"].tolist() == ["1", "2", "1"]
    options = ManifestOptions(patient_pattern="VID.")
    assert read_clips([tmp_path], options=options)["patient"].tolist()[0] == "VID1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: no such manifest"),
        (["runs"], "holds neither train.csv nor any video"),
        (["empty.csv"], "empty.csv: lists no clip"),
        (["m.csv", "--patient-pattern", "("], "is no regular expression"),
        (["m.csv", "--num-workers", "-1"], "must be at least 0"),
        (["m.csv", "--looped", "none.csv"], "none.csv: no such manifest"),
        (["m.csv", "--looped", "empty.csv"], "empty.csv: lists no clip"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path, mistake) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty.csv").write_text("path,label\n")
    (tmp_path / "m.csv").write_text("path,label\na.mp4,x\n")
    code, stderr = mistake(main, "audit", *arguments, cwd=tmp_path)
    assert code == 2
    assert message in stderr


def test_the_official_slam_split_shares_patients(real: Path, tmp_path: Path, run_main) -> None:
    said = run_main(main, "audit", real / "slam/looped_clips.csv", cwd=tmp_path, code=1).stdout
    assert "patients: 21 of 33" in said
    assert "videos: 30 of 82" in said
    assert "199 clips in train, val, test" in said


def test_one_csv_with_odd_splits(tmp_path: Path, capsys) -> None:
    """A manifest called all.csv, a blank cell, a split of another name: nothing is left out."""
    rows = ["a.mp4,x,p1,train", "b.mp4,x,p1,", "c.mp4,x,p2,holdout", "d.mp4,x,p2,train"]
    (tmp_path / "all.csv").write_text("path,label,patient,split\n" + "\n".join(rows) + "\n")
    assert audit(AuditConfig((str(tmp_path / "all.csv"),), output=str(tmp_path / "out"))) == 1
    said = capsys.readouterr().out
    assert "patients: 2 of 2" in said
    assert "4 clips in train, (none), holdout" in said
    (tmp_path / "all.csv").write_text("path,label,patient\na.mp4,all,p1\nb.mp4,x,p2\n")
    assert audit(AuditConfig((str(tmp_path / "all.csv"),), output=str(tmp_path / "out"))) == 3
    assert (
        "NOTHING WAS COMPARED: only one split (name a manifest or folder" in capsys.readouterr().out
    )


def test_manifests_of_one_name_are_different_splits(tmp_path: Path) -> None:
    for folder in ("A/data", "B/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.csv").write_text("path,label,patient\na.mp4,x,p1\n")
    sources = [tmp_path / "A/data/train.csv", tmp_path / "B/data/train.csv"]
    clips = read_clips([*sources, sources[0]])  # one is named twice: it is read once
    assert clips["split"].tolist() == ["A/data/train", "B/data/train"]
    assert len(overlaps(clips)) == 1


def test_videos_and_actions_are_a_patients_own(tmp_path: Path) -> None:
    """Two patients' first videos are two videos."""
    text = "path,label,patient,video,action,split\na.mp4,x,p1,1,1,train\nb.mp4,x,p2,1,1,test\n"
    (tmp_path / "m.csv").write_text(text)
    clips = read_clips([tmp_path / "m.csv"])
    assert clips["video"].tolist() == ["p1_1", "p2_1"]
    assert clips["action"].tolist() == ["p1_1_1", "p2_1_1"]
    assert len(overlaps(clips)) == 0


@pytest.mark.parametrize("kind", ["patient", "video", "action", "content", "near_duplicate"])
def test_every_kind_of_overlap_is_leakage(kind: str, capsys) -> None:
    clips = pd.DataFrame({"split": ["train", "test"], kind: ["one", "one"]}).astype(object)
    assert _print_overlaps(clips)
    assert f"{KINDS[kind]}: 1 of 1\n" in capsys.readouterr().out
    clips[kind] = ["one", "other"]
    assert not _print_overlaps(clips)


def test_a_file_that_may_not_be_read_is_counted(tmp_path: Path, monkeypatch, capsys) -> None:
    write_video(tmp_path / "a.mp4", render(Clip("train", 3, 1, 1, 1, "HookCut"))[:4])
    (tmp_path / "m.csv").write_text("path,label,patient\na.mp4,x,p1\n")

    def denied(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("clips.audit.sha256_file", denied)
    output = str(tmp_path / "out")
    assert audit(AuditConfig((str(tmp_path / "m.csv"),), output=output, num_workers=0)) == 3
    assert "1 files cannot be read" in capsys.readouterr().out


def test_slams_other_names_are_joined_only_where_all_are_slams(tmp_path: Path) -> None:
    (tmp_path / "slam.csv").write_text("path,label\na.mp4,Needle\nb.mp4,UseClip\n")
    (tmp_path / "own.csv").write_text("path,label\na.mp4,needle\nb.mp4,thread\n")
    assert read_clips([tmp_path / "slam.csv"])["label"].tolist() == ["Suturing", "UseClipper"]
    assert read_clips([tmp_path / "own.csv"])["label"].tolist() == ["needle", "thread"]


def test_numbers_are_no_names_of_slams_classes(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("path,label\na.mp4,1.0\nb.mp4,2.0\n")
    assert read_clips([tmp_path / "n.csv"])["label"].tolist() == ["1.0", "2.0"]


def test_tables_are_harmless_and_odd_labels_are_told(tmp_path: Path, capsys) -> None:
    text = "path,label,patient,split\na.mp4,=cut,@P1,train\nb.mp4,uncertain,@P1,=test\n"
    (tmp_path / "m.csv").write_text(text)
    output = str(tmp_path / "out")
    audit(AuditConfig((str(tmp_path / "m.csv"),), output=output, names=True))
    printed = capsys.readouterr().out
    assert "train.py will refuse these labels: classes: no class may be called 'uncerta" in printed
    assert (tmp_path / "out/overlaps.csv").read_text("utf-8") == (
        "kind,unit,train,'=test,lines\npatient,'@P1,1,1,m.csv:2 m.csv:3\n"
    )
    classes = {row.cells[0] for row in read_table(tmp_path / "out/composition.csv").rows[1:]}
    assert classes == {"=cut", "uncertain", "(all)"}


def test_overlaps_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    table = {name: rng.integers(0, 12, 60).astype(str) for name in ("patient", "video", "action")}
    clips = pd.DataFrame(table).astype(object)
    clips["split"] = np.array(["val", "other", "train", "test"])[rng.integers(0, 4, 60)]
    clips["manifest"] = [f"folder/{split}.csv" for split in clips["split"]]
    clips["line"] = range(1, 61)
    clips.loc[rng.random(60) < 0.3, "patient"] = None
    expected = []
    for kind in ("patient", "video", "action"):
        units = dict.fromkeys(unit for unit in clips[kind] if unit is not None)
        for unit in units:
            members = clips[clips[kind] == unit]
            if members["split"].nunique() > 1:
                counts = [(members["split"] == s).sum() for s in ("train", "val", "test", "other")]
                pairs = zip(members["split"], members["line"], strict=True)
                lines = " ".join(f"{split}.csv:{line}" for split, line in pairs)
                expected.append([kind, unit, *counts, lines])
    table = overlaps(clips, names=True)
    assert table.to_numpy().tolist() == expected
    assert list(table) == ["kind", "unit", "train", "val", "test", "other", "lines"]
    assert overlaps(clips)["unit"][0] == "patient 1"


def test_a_missing_clip_costs_two_look_ups(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(f"{i}.mp4,x\n" for i in range(9)))
    asked = []
    look_up = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **o: asked.append(path) or look_up(path, **o))
    clips = read_clips([tmp_path / "train.csv"])
    assert clips["file"].isna().all()
    assert len([path for path in asked if str(path).endswith(".mp4")]) == 18
