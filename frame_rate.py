"""How fast time passes for a model: the frames a second that it saw in training.

A model that learnt from 16 frames of a clip of 1.2 s takes motion at 13 frames a second for normal.
Whatever it is to recognise in a whole video must be shown to it at that rate.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sampling import Sampling
from video_file import ClipError, probe


def seen_frame_rate(
    paths: Sequence[Path], n_frames: int, sampling: Sampling, most: int = 50
) -> float | None:
    """Frames a second of the clips that a model is given, the median over some of these files.

    Returns:
        None if no file tells its rate.
    """
    rates = []
    for path in paths[:: max(1, len(paths) // most)]:
        try:
            facts = probe(path)
        except ClipError:
            continue
        if facts.seconds and sampling == "first":
            rates.append(facts.rate)
        elif facts.seconds:  # all frames of a short clip, n_frames of a long one
            rates.append(min(n_frames, facts.frames) / facts.seconds)
    return float(np.median(rates)) if rates else None
