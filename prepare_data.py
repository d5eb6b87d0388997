"""The work before training.

python prepare_data.py audit /data/SLAM                          do the splits share patients?
python prepare_data.py check /data/SLAM                          can every file be read?
python prepare_data.py split /data/SLAM --output splits          new splits that share none
python prepare_data.py split /data/SLAM --output folds --folds 5
python prepare_data.py cache /data/SLAM --output cache224        read clips fast in training
"""

import sys

import tyro

from audit import AuditConfig, audit
from cache_filling import CacheConfig, fill_cache
from clip_check import CheckConfig, check
from script import script
from splitting import SplitConfig, split


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
