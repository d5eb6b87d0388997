"""Check, split and cache a data set before training, or cut it out of annotated videos.

python prepare_data.py audit /data/SLAM                            do splits share patients?
python prepare_data.py check /data/SLAM                            can every file be read?
python prepare_data.py split /data/SLAM --output splits            new splits by patient
python prepare_data.py split /data/SLAM --output folds --folds 5   for cross_validate.py
python prepare_data.py cache /data/SLAM --output cache224          faster reading in training
python prepare_data.py clips videos --annotations ann --output cut clips of whole videos
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from clips.audit import AuditConfig, audit
from clips.build_cache import CacheConfig, fill_cache
from clips.clip_table import read_clips
from clips.cut import CutConfig, cut
from clips.manifest_formats import ManifestOptions
from clips.split import SplitConfig, split
from clips.splits import BAD_FILES
from utils.cli import cli_main, parse_subcommand
from utils.errors import UserError
from utils.files import require_writable_file, try_write
from utils.sharding import remove_results, run_shared, this_shard
from utils.tables import require_own_table, write_csv
from video.clip_reader import check_clip
from video.motion import Modality

# Earlier names of settings and values.
OLD_NAMES = {
    "workers": "num_workers",
    "alike_bits": "max_hamming_distance",
    "inputs": "modality",
    "per_segment": "frames_per_segment",
}
OLD_VALUES = {"modality": {"rgb+vectors": "rgb+mv"}}


@dataclass(frozen=True)
class CheckConfig(ManifestOptions):
    """Decode every frame of every clip, read each clip as training does, and list the bad files.

    The exit code is 1 if there are any.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """manifests, folders that hold train.csv, val.csv and test.csv, or folders of clips"""
    data_root: str = ""
    """folder of the clips (empty: the folder of each manifest)"""
    modality: Literal["rgb", "rgb+mv"] = "rgb"
    """what training will read; with rgb+mv, files without motion vectors are bad"""
    output: str = "runs/bad_clips.csv"
    """CSV for the list of bad files: path, reason"""
    num_workers: int = 2
    """number of processes that decode"""
    shard: str = ""
    """i/n: check part i of n, from 0, and keep the results beside the output; the process that
    finds all parts done writes the list (docs/scale.md; torchrun does this by itself)"""


def check(config: CheckConfig) -> int:
    """Decode and read all clips and write the list of bad ones.

    Returns:
        The exit code: 1 if a file is bad.

    Raises:
        UserError: there is nothing to check.
    """
    if config.num_workers < 0:
        raise UserError(f"num_workers = {config.num_workers}: must be at least 0")
    shard = this_shard(config.shard)
    clips = read_clips(config.sources, config.data_root, ManifestOptions.of(config))
    output = Path(config.output)
    require_writable_file(output)
    require_own_table(output, BAD_FILES)
    missing = clips[clips["file"].isna()]
    bad = [(path, "no such file") for path in missing["path"]]
    files = list(dict.fromkeys(clips["file"].dropna()))
    check_file = partial(check_clip, motion=Modality.parse(config.modality).stored_motion)
    parts = output.with_name(f"{output.name}.parts")
    options = config.num_workers, "decoding", shard, parts, _as_text, _as_text
    problems = run_shared(check_file, files, *options)
    if problems is None:
        return 0
    bad += [(str(file), problem) for file, problem in problems.items() if problem]
    print(f"{len(files) + len(missing):,} files, {len(bad):,} of them bad: {output}")
    for reason, count in Counter(reason for _, reason in bad).most_common(10):
        print(f"  {count:,}: {reason}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if problem := try_write(output, lambda path: write_csv(path, [BAD_FILES, *bad])):
        print("\n".join(f"{path}: {reason}" for path, reason in bad))
        raise UserError(problem)
    if shard:
        remove_results(parts)
    return int(bool(bad))


def _as_text(problem: Any) -> str:
    """Why a file is bad; empty if it is not. What a file of results holds may be anything."""
    return str(problem or "")


COMMANDS = {
    "audit": (AuditConfig, audit),
    "check": (CheckConfig, check),
    "split": (SplitConfig, split),
    "cache": (CacheConfig, fill_cache),
    "clips": (CutConfig, cut),
}


@cli_main
def main() -> None:
    configs = {name: config for name, (config, _) in COMMANDS.items()}
    config = parse_subcommand(configs, __doc__, OLD_NAMES, OLD_VALUES)
    sys.exit(dict(COMMANDS.values())[type(config)](config))


if __name__ == "__main__":
    main()
