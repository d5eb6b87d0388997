"""Motion fields from the motion vectors stored in H.264 and MPEG streams.

Each block of a predicted picture has a vector to where it was copied from: `vector` = source minus
destination. The source is in a reference picture of list 0 (usually in the past) or of list 1
(usually in the future; B-frames may use both). The block's content moved by `-vector / distance`
per frame, where the distance is the number of frames from the reference picture to this one,
negative for a future one. (Wu et al., Compressed Video Action Recognition, arXiv:1712.00636, use
the vectors as they are.)

FFmpeg tells the list of a block's reference picture, but not which picture it is. It is assumed to
be the nearest in time among the reference pictures decoded before. That is exact for MPEG-1 and
MPEG-2, which have no other, and for the first entry of each list of H.264, which encoders mostly
use. Where a block was copied from further away, its motion comes out too large. Pictures without
vectors (intra) have no motion. In FFmpeg the B-frames of MPEG-4 part 2, and often the last frame of
an MPEG file, have none either. Encoders search for what is cheap to code, not for motion: in flat
regions the vectors are random.
"""

from bisect import bisect, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags2
from av.video.frame import PictureType

from video import h264
from video.container import ClipError, decoding_stream, open_video
from video.motion import encode_motion, grid_side

# The decoders of FFmpeg that were seen to export their vectors.
CODECS = {"h264", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "wmv1", "wmv2",
          "msmpeg4v1", "msmpeg4v2", "msmpeg4"}  # fmt: skip

BLOCK = 8  # pixels; larger blocks are 16 wide or high, and start at multiples of 8

Coded = tuple[int, bool]
"""A frame number, and whether other frames are predicted from this frame."""


class VectorReader:
    """Collects the motion of the frames that decoder.py keeps while it decodes a file.

    Args:
        path: the file, for error messages.
        size: height and width of the clip in pixels.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.side = grid_side(size)
        self.begin([])

    def begin(self, order: Iterable[Coded]) -> None:
        """Start (again) to decode. `order` is the decoding order, if it is known already."""
        self._order = list(order)
        self._kept: dict[int, tuple[np.ndarray, int]] = {}  # sums of vectors, quarter turns

    def export(self, stream: av.VideoStream) -> None:
        """Make the decoder export the vectors.

        Raises:
            ClipError: it cannot.
        """
        context = stream.codec_context
        if context.name not in CODECS:
            raise ClipError(
                self.path, f"its codec, {context.name}, gives no motion vectors: use rgb+flow"
            )
        context.flags2 |= Flags2.export_mvs

    def decode(self, path: Path, index: int) -> Iterator[av.VideoFrame]:
        """All frames of stream `index`, as `container.decode` yields them, noting their order."""
        self.begin([])
        packets: list[tuple[int | None, bool]] = []
        frames: list[tuple[int | None, bool]] = []
        with open_video(path) as container:
            stream = decoding_stream(container, index)
            self.export(stream)
            is_h264 = stream.codec_context.name == "h264"
            length_size = h264.length_size(stream.codec_context.extradata)
            for packet in container.demux(stream):
                if is_h264 and packet.size:
                    reference = h264.is_reference(bytes(packet), length_size)
                    packets.append((packet.pts, reference))
                for frame in packet.decode():
                    frames.append((frame.pts, frame.pict_type != PictureType.B))
                    yield frame
        self._order = decoding_order(packets, frames)

    def keep(self, number: int, frame: av.VideoFrame) -> None:
        """Keep the vectors of frame `number`."""
        vectors = frame.side_data.get("MOTION_VECTORS")
        sums = np.zeros((2, 3, self.side, self.side), np.float32)
        if vectors is not None:
            blocks = block_sums(vectors.to_ndarray(), frame.width, frame.height)
            sums = resample_sums(blocks, frame.width, frame.height, self.side)
        self._kept[number] = (sums, round(frame.rotation / 90))

    def fields(self, numbers: Sequence[int]) -> np.ndarray:
        """The motion of kept frames, `(n, 2, h, w)` uint8; see motion.py."""
        distances = reference_distances(self._order)
        fields = {
            number: rotate_field(mean_motion(sums, distances[number]), turns)
            for number, (sums, turns) in self._kept.items()
        }
        return encode_motion(np.stack([fields[number] for number in numbers]))


def reference_distances(order: Sequence[Coded]) -> dict[int, tuple[int, int]]:
    """The distance in frames from the references of list 0 and list 1 to each frame.

    Args:
        order: the frames in decoding order.

    Returns:
        For each frame number two distances, negative where the reference is shown later. List 0
        looks back and list 1 forward, or in the other direction if there is no reference.
    """
    distances = {}
    decoded: list[int] = []
    for number, reference in order:
        position = bisect(decoded, number)
        past = [number - other for other in decoded[max(0, position - 1) : position]]
        future = [number - other for other in decoded[position : position + 1]]
        distances[number] = ([*past, *future, 1][0], [*future, *past, -1][0])
        if reference:
            insort(decoded, number)
    return distances


def decoding_order(
    packets: Sequence[tuple[int | None, bool]], frames: Sequence[tuple[int | None, bool]]
) -> list[Coded]:
    """The frames of a stream in decoding order.

    Timestamps are only used to find out which packet became which frame, because they may be wrong
    otherwise. Where they do not tell that, each reference frame is assumed to be decoded before the
    B-frames that are shown before it.

    Args:
        packets: in decoding order, the timestamp and whether other frames are predicted from it.
        frames: the same for the frames, in the order in which they came out.
    """
    numbers = {pts: number for number, (pts, _) in enumerate(frames)}
    matched = [(numbers[pts], reference) for pts, reference in packets if pts in numbers]
    if len(numbers) == len(frames) == len(matched) == len({number for number, _ in matched}):
        return matched
    order, b_frames = [], []
    for number, (_, reference) in enumerate(frames):
        if reference:
            order += [(number, reference), *b_frames]
            b_frames = []
        else:
            b_frames.append((number, reference))
    return order + b_frames


def block_sums(vectors: np.ndarray, width: int, height: int) -> np.ndarray:
    """Add each vector to the cells of 8 x 8 pixels that its block covers.

    Args:
        vectors: structured array of FFmpeg's AVMotionVector; dst is the centre of a block.

    Returns:
        `(2, 3, rows, columns)`: for list 0 and list 1 the sum of the vectors to the right and down,
        as fractions of the width and height, and the number of vectors.
    """
    columns, rows = -(-width // BLOCK), -(-height // BLOCK)
    sums = np.zeros((3, 2 * rows * columns), np.float32)
    scale = vectors["motion_scale"].astype(np.float32)
    values = (vectors["motion_x"] / scale / width, vectors["motion_y"] / scale / height, None)
    wide, high = vectors["w"].astype(int), vectors["h"].astype(int)
    left = (vectors["dst_x"] - wide // 2) // BLOCK
    top = (vectors["dst_y"] - high // 2) // BLOCK
    first_row = np.where(
        vectors["source"] < 0, 0, rows
    )  # the rows of list 1 follow those of list 0
    for down, right in ((0, 0), (0, BLOCK), (BLOCK, 0), (BLOCK, BLOCK)):
        row, column = top + down // BLOCK, left + right // BLOCK
        covered = (wide > right) & (high > down)
        covered &= (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        cells = ((first_row + row) * columns + column)[covered]
        for total, value in zip(sums, values, strict=True):
            weights = None if value is None else value[covered]
            total += np.bincount(cells, weights, len(total))
    return sums.reshape(3, 2, rows, columns).swapaxes(0, 1)


def resample_sums(sums: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """Resample `(2, 3, rows, columns)` to `(2, 3, side, side)`.

    The result ends at the frame's edge, not at the end of the last block.
    """
    from PIL import Image  # not above: only this modality needs it

    box = (0, 0, width / BLOCK, height / BLOCK)
    planes = [
        Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR, box)
        for plane in sums.reshape(-1, *sums.shape[2:])
    ]
    return np.stack([np.asarray(plane) for plane in planes]).reshape(2, 3, side, side)


def mean_motion(sums: np.ndarray, distances: tuple[int, int]) -> np.ndarray:
    """The mean motion per frame of each cell, and 0 in cells without vectors.

    Args:
        sums: `(2, 3, h, w)`, see `block_sums`.
        distances: see `reference_distances`.

    Returns:
        `(2, h, w)` motion to the right and down, as fractions of the width and height.
    """
    (x0, y0, n0), (x1, y1, n1) = sums
    first, second = distances
    total = np.stack([x0, y0]) / -first + np.stack([x1, y1]) / -second
    count = n0 + n1
    return np.where(count > 1e-3, total / np.maximum(count, 1e-3), 0)


def rotate_field(field: np.ndarray, turns: int) -> np.ndarray:
    """Rotate `(2, h, w)` motion as `np.rot90` rotates its frame: counter-clockwise."""
    for _ in range(turns % 4):
        right, down = np.rot90(field, axes=(1, 2))
        field = np.stack([down, -right])
    return field
