"""What a pretraining keeps of its clips, so that they are recognised later without their names.

Patients are kept as the SHA-256 of their name, files as the SHA-256 of their content, and frames as
perceptual hashes, two per second: a clip that was cut out of a pretrained video is found by its
frames, also when it was encoded again. The digest of a name cannot be read, but a short name can be
guessed by trying all.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clips.manifest import ClipRow
from clips.perceptual_hash import hash_frame, sha256_file
from utils.workers import in_parallel
from video.container import ClipError, probe
from video.decoder import read_frames

HASHES_PER_SECOND = 2.0  # of what was pretrained on
COMPARED_PER_SECOND = 10.0  # of a clip that is compared: one is near each hash that was kept
# Bits of 64 that may differ between two pictures of one moment. Of 20 excerpts of a recording of
# 10 s, encoded again at a quarter of its size, this finds all; of 148 real clips and 280 of the
# demo it takes none for one of another patient, and 4 bits take one.
MAX_DISTANCE = 2
_USUAL_RATE = 25.0  # where a file does not tell its frames per second
_CHUNK = 1024


class Fingerprint(NamedTuple):
    """What the content of a clip is recognised by."""

    sha256: str
    hashes: np.ndarray
    """`(N, 64)` bool, of frames that are not almost uniform"""
    uniform: int = 0
    """number of frames without a hash: black, white, of one colour"""
    problem: str = ""
    """why the clip cannot be read; the other parts are empty then"""


def fingerprint(row: ClipRow, per_second: float) -> Fingerprint:
    """The fingerprint of a clip, from about `per_second` frames of each second, evenly spread."""
    try:
        rate = probe(row.path).rate or row.fps or _USUAL_RATE

        def choose(count: int) -> list[int]:
            wanted = min(count, max(1, round(count / rate * per_second)))
            return [int((k + 0.5) * count / wanted) for k in range(wanted)]

        hashes = [hash_frame(frame) for frame in read_frames(row.path, choose, 128)]
        known = [bits for bits in hashes if bits is not None]
        array = np.array(known, bool).reshape(-1, 64)
        return Fingerprint(sha256_file(row.path), array, len(hashes) - len(known))
    except (ClipError, OSError) as error:
        reason = error.reason if isinstance(error, ClipError) else str(error)
        return Fingerprint("", np.empty((0, 64), bool), 0, reason)


def fingerprints(rows: Sequence[ClipRow], per_second: float, num_workers: int) -> list[Fingerprint]:
    """The fingerprint of each clip, in order, with a progress bar."""
    read = partial(fingerprint, per_second=per_second)
    found = in_parallel(read, rows, num_workers, "fingerprints of the clips")
    return [result for _, result in found]


def name_digest(patient: str) -> str:
    """The SHA-256 of a patient's name."""
    return hashlib.sha256(patient.strip().encode("utf-8", "surrogateescape")).hexdigest()


def pack(
    method: str,
    clips: int,
    licence: str,
    rows: Iterable[ClipRow],
    found: Iterable[Fingerprint],
    files: Iterable[Path] = (),
) -> dict[str, Any]:
    """The entry `pretraining` of encoder.pt and of checkpoints; see `modeling.weights`.

    Args:
        found: the fingerprints of `rows`.
        files: whole videos that the clips were cut from.
    """
    found = list(found)
    patients = {name_digest(row.patient) for row in rows if row.patient}
    contents = {one.sha256 for one in found} | {sha256_file(path) for path in files}
    hashes = np.unique(
        np.concatenate([np.empty((0, 64), bool), *(f.hashes for f in found)]), axis=0
    )
    return {
        "method": method,
        "clips": clips,
        "licence": licence,
        "patients": _to_tensor(patients),
        "files": _to_tensor(contents),
        "frames": torch.from_numpy(np.packbits(hashes, axis=1)),
    }


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a pretraining that continued from another one: both were seen."""
    if not first or not second:
        return dict(first or second)
    merged = {
        name: torch.unique(torch.cat((first[name], second[name])), dim=0)
        for name in ("patients", "files", "frames")
    }
    licences = dict.fromkeys(text for text in (first["licence"], second["licence"]) if text)
    methods = f"{first['method']}, then {second['method']}"
    clips = first["clips"] + second["clips"]
    return {"method": methods, "clips": clips, "licence": " and ".join(licences), **merged}


class Seen(NamedTuple):
    """What of a split a model was pretrained on."""

    patients: list[str]
    """names of patients, sorted"""
    clips: list[Path]
    """clips that were found by their content"""
    unreadable: list[Path]
    """clips that could not be compared by their content"""


def find_seen(
    rows: Sequence[ClipRow], pretraining: Mapping[str, Any], num_workers: int = 0
) -> Seen:
    """What of these clips a pretraining has seen: patients by their names, clips by their files,
    and clips of which two frames (the only one, of a single frame) look like one that it has seen.
    """
    digests = _to_set(pretraining["patients"])
    patients = sorted({r.patient for r in rows if r.patient and name_digest(r.patient) in digests})
    files, frames = _to_set(pretraining["files"]), pretraining["frames"].numpy()
    known = 2.0 * np.unpackbits(frames, axis=1).astype(np.float32) - 1  # (N, 64) of -1 and 1
    clips, unreadable = [], []
    read = fingerprints(rows, COMPARED_PER_SECOND, num_workers)
    for row, found in zip(rows, read, strict=True):
        if found.problem:
            unreadable.append(row.path)
        elif found.sha256 in files or _look_alike(found.hashes, known):
            clips.append(row.path)
    return Seen(patients, clips, unreadable)


def _look_alike(hashes: np.ndarray, known: np.ndarray) -> bool:
    """Whether two of these frames (or the only one) look like known ones."""
    signs = 2.0 * hashes.astype(np.float32) - 1
    least = 64 - 2 * MAX_DISTANCE  # the product of two rows is 64 - 2 * the bits that differ
    alike = np.zeros(len(signs), bool)
    for start in range(0, len(known), _CHUNK):
        alike |= (signs @ known[start : start + _CHUNK].T >= least).any(axis=1)
    return len(signs) > 0 and alike.sum() >= min(2, len(signs))


def _to_tensor(digests: Iterable[str]) -> torch.Tensor:
    """`(N, 32)` uint8: tensors are a tenth of the size of texts in a file, and read at once."""
    content = b"".join(bytes.fromhex(digest) for digest in sorted(digests))
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, 32).copy())


def _to_set(digests: torch.Tensor) -> set[str]:
    return {row.tobytes().hex() for row in digests.numpy()}
