"""The work before training.

python prepare_data.py audit /data/SLAM                          do the splits share patients?
python prepare_data.py check /data/SLAM                          can every file be read?
python prepare_data.py split /data/SLAM --output splits          new splits that share none
python prepare_data.py split /data/SLAM --output folds --folds 5
python prepare_data.py cache /data/SLAM --output cache224        read clips fast in training
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

from clips.audit import AuditConfig, audit
from clips.build_cache import CacheConfig, fill_cache
from clips.clip_table import read_clips
from clips.split import SplitConfig, split
from utils.cli import script
from utils.errors import UserError
from utils.files import write_text
from utils.workers import in_parallel
from video.decoder import check_video


@dataclass
class CheckConfig:
    """Decode every frame of every clip and list the bad files.

    Ends with exit code 1 if there are any.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """manifests, folders that hold train.csv, val.csv and test.csv, or folders of videos"""
    data_root: str = ""
    """folder of the clips (empty: each manifest's own)"""
    output: str = "bad_clips.csv"
    """where the list goes: path, reason"""
    workers: int = 2
    """processes that decode"""


def check(config: CheckConfig) -> int:
    """Decode everything and write the list. Returns the exit code: 1 if a file is bad.

    Raises:
        UserError: there is nothing to check.
    """
    if config.workers < 0:
        raise UserError(f"workers = {config.workers}: must be at least 0")
    clips = read_clips(config.sources, config.data_root)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    missing = clips[clips["place"].isna()]
    bad = [(path, "no such file") for path in missing["path"]]
    places = list(dict.fromkeys(clips["place"].dropna()))
    for place, problem in in_parallel(check_video, places, config.workers, "decoding"):
        if problem:
            bad.append((str(place), problem))
    table = pd.DataFrame(bad, columns=["path", "reason"])
    write_text(config.output, table.to_csv(index=False))
    print(f"{len(places) + len(missing):,} files, {len(bad):,} of them bad: {config.output}")
    for reason, count in Counter(reason for _, reason in bad).most_common(10):
        print(f"  {count:,}: {reason}")
    return int(bool(bad))


@script
def main() -> None:
    commands = {
        "audit": AuditConfig,
        "check": CheckConfig,
        "split": SplitConfig,
        "cache": CacheConfig,
    }
    work = {AuditConfig: audit, CheckConfig: check, SplitConfig: split, CacheConfig: fill_cache}
    config = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    sys.exit(work[type(config)](config))


if __name__ == "__main__":
    main()
