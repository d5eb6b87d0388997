"""Motion for nothing: the vectors that the encoder found and the stream brings along.

A block of a predicted picture says where it was copied from: `vector` = source minus place, in the
picture of list 0 (usually the past) or list 1 (usually the future; B-frames may use both). Its
content moved by `-vector / distance` a frame, where distance is the number of frames from that
picture to this one, negative for the future (Wu et al., Compressed Video Action Recognition,
arXiv:1712.00636, use the vectors as they are).

FFmpeg does not say which picture a block was copied from, only the list. It is taken for the one
nearest in time of those decoded before that other pictures are predicted from: exact for MPEG-1 and
2, where there is no other, and for the first place of each list of H.264, which encoders mostly
use. Blocks copied from further away count too much. Pictures without vectors (intra) have no
motion, nor, in FFmpeg, have the B-frames of MPEG-4 part 2 and often an MPEG file's last frame.
Encoders look for what is cheap to code, not for motion: flat places have vectors at random.
"""

from bisect import bisect, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags2
from av.video.frame import PictureType
from PIL import Image

from video import h264
from video.container import ClipError, decoding_stream, open_video
from video.motion import encode_motion, grid_side

# FFmpeg's decoders that were seen to tell their vectors.
CODECS = {"h264", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "wmv1", "wmv2",
          "msmpeg4v1", "msmpeg4v2", "msmpeg4"}  # fmt: skip

BLOCK = 8  # pixels; larger blocks are 16 wide or high, and start at multiples of 8

Coded = tuple[int, bool]
"""A picture's number, as shown, and whether others are predicted from it."""


class VectorReader:
    """Gathers the motion of the frames that video.py keeps while it decodes a file."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.side = grid_side(size)
        self.begin([])

    def begin(self, order: Iterable[Coded]) -> None:
        """Forget everything: decoding starts anew. `order` is the decoding order, if known."""
        self._order = list(order)
        self._kept: dict[int, tuple[np.ndarray, int]] = {}  # sums of vectors, quarters to turn

    def export(self, stream: av.VideoStream) -> None:
        """Have the decoder tell the vectors.

        Raises:
            ClipError: it cannot.
        """
        context = stream.codec_context
        if context.name not in CODECS:
            raise ClipError(
                self.path, f"its codec, {context.name}, tells no motion vectors: use rgb+flow"
            )
        context.flags2 |= Flags2.export_mvs

    def decode(self, path: Path, index: int) -> Iterator[av.VideoFrame]:
        """All frames of stream `index`, as `video_file.decode`; at the end their order is known."""
        self.begin([])
        packets: list[tuple[int | None, bool]] = []
        shown: list[tuple[int | None, bool]] = []
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
                    shown.append((frame.pts, frame.pict_type != PictureType.B))
                    yield frame
        self._order = decoding_order(packets, shown)

    def keep(self, number: int, frame: av.VideoFrame) -> None:
        """Take the vectors of frame `number`."""
        vectors = frame.side_data.get("MOTION_VECTORS")
        sums = np.zeros((2, 3, self.side, self.side), np.float32)
        if vectors is not None:
            blocks = block_sums(vectors.to_ndarray(), frame.width, frame.height)
            sums = on_grid(blocks, frame.width, frame.height, self.side)
        self._kept[number] = (sums, round(frame.rotation / 90))

    def fields(self, numbers: Sequence[int]) -> np.ndarray:
        """The motion of these frames, kept before, `(n, 2, h, w)` uint8; see motion.py."""
        distances = reference_distances(self._order)
        fields = {
            number: turned(mean_motion(sums, distances[number]), quarters)
            for number, (sums, quarters) in self._kept.items()
        }
        return encode_motion(np.stack([fields[number] for number in numbers]))


def reference_distances(order: Sequence[Coded]) -> dict[int, tuple[int, int]]:
    """How many pictures lie from the references of list 0 and list 1 to each picture.

    Args:
        order: the pictures as they are decoded.

    Returns:
        For each picture two numbers, negative where the reference is shown later. List 0 looks back
        and list 1 forward, or, where nothing is there, both the other way.
    """
    distances = {}
    decoded: list[int] = []
    for number, reference in order:
        place = bisect(decoded, number)
        past = [number - one for one in decoded[max(0, place - 1) : place]]
        future = [number - one for one in decoded[place : place + 1]]
        distances[number] = ([*past, *future, 1][0], [*future, *past, -1][0])
        if reference:
            insort(decoded, number)
    return distances


def decoding_order(
    packets: Sequence[tuple[int | None, bool]], shown: Sequence[tuple[int | None, bool]]
) -> list[Coded]:
    """The frames of a stream in the order that they were decoded in.

    Args:
        packets: time stamps in decoding order, and whether other pictures are predicted from them.
        shown: the same of the frames as they came out.

    A time stamp only tells which packet became which frame: it may be wrong otherwise. Where it
    does not tell that, each reference is taken to come before the B-frames shown before it.
    """
    numbers = {pts: number for number, (pts, _) in enumerate(shown)}
    found = [(numbers[pts], reference) for pts, reference in packets if pts in numbers]
    if len(numbers) == len(shown) == len(found) == len({number for number, _ in found}):
        return found
    order, waiting = [], []
    for number, (_, reference) in enumerate(shown):
        waiting.append((number, reference))
        if reference:
            order += [waiting.pop(), *waiting]
            waiting = []
    return order + waiting


def block_sums(vectors: np.ndarray, width: int, height: int) -> np.ndarray:
    """Vectors, each added to the 8 x 8 cells that its block covers.

    Args:
        vectors: FFmpeg's AVMotionVector; dst is the centre of a block.

    Returns:
        `(2, 3, rows, columns)`: for list 0 and 1 the sums of the vectors to the right and down, in
        shares of the width and height, and how many there are.
    """
    columns, rows = -(-width // BLOCK), -(-height // BLOCK)
    sums = np.zeros((3, 2 * rows * columns), np.float32)
    scale = vectors["motion_scale"].astype(np.float32)
    values = (vectors["motion_x"] / scale / width, vectors["motion_y"] / scale / height, None)
    wide, high = vectors["w"].astype(int), vectors["h"].astype(int)
    left = (vectors["dst_x"] - wide // 2) // BLOCK
    top = (vectors["dst_y"] - high // 2) // BLOCK
    first_row = np.where(vectors["source"] < 0, 0, rows)  # of list 1 below those of list 0
    for down, right in ((0, 0), (0, BLOCK), (BLOCK, 0), (BLOCK, BLOCK)):
        row, column = top + down // BLOCK, left + right // BLOCK
        covered = (wide > right) & (high > down)
        covered &= (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        cells = ((first_row + row) * columns + column)[covered]
        for total, value in zip(sums, values, strict=True):
            weights = None if value is None else value[covered]
            total += np.bincount(cells, weights, len(total))
    return sums.reshape(3, 2, rows, columns).swapaxes(0, 1)


def on_grid(sums: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """`(2, 3, rows, columns)` brought to `(2, 3, side, side)`; the grid ends where the picture
    does, not with its last block."""
    box = (0, 0, width / BLOCK, height / BLOCK)
    planes = [
        Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR, box)
        for plane in sums.reshape(-1, *sums.shape[2:])
    ]
    return np.stack([np.asarray(plane) for plane in planes]).reshape(2, 3, side, side)


def mean_motion(sums: np.ndarray, distances: tuple[int, int]) -> np.ndarray:
    """`(2, 3, h, w)` sums of vectors as the mean motion a frame, `(2, h, w)` shares; 0 without."""
    (x0, y0, n0), (x1, y1, n1) = sums
    first, second = distances
    total = np.stack([x0, y0]) / -first + np.stack([x1, y1]) / -second
    count = n0 + n1
    return np.where(count > 1e-3, total / np.maximum(count, 1e-3), 0)


def turned(field: np.ndarray, quarters: int) -> np.ndarray:
    """`(2, h, w)` motion as its picture is turned by `np.rot90`, counter-clockwise."""
    for _ in range(quarters % 4):
        right, down = np.rot90(field, axes=(1, 2))
        field = np.stack([down, -right])
    return field
