"""Other ways to do what this project does, for comparison in the benchmarks only.

The naive ones are what a first version of a training script does. The libraries are optional
(requirements-dev.txt): `decoders()` lists what works here.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from clips.manifest import ClipRow
from utils.errors import first_line
from video.clip_reader import FrameSampler
from video.encoder import write_video

Decoder = Callable[[Path, int, int], np.ndarray]
"""path, n_frames and size to the frames of the clip, `(n_frames, size, size, 3)` uint8"""


def decode_naively(path: Path, n_frames: int, size: int) -> np.ndarray:
    """PyAV: decode all frames, convert all to RGB, resize the sampled ones with PIL."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    images = [Image.fromarray(frames[i]) for i in FrameSampler(n_frames).indices(len(frames))]
    return np.stack([np.asarray(image.resize((size, size))) for image in images])


def decode_with_decord(path: Path, n_frames: int, size: int) -> np.ndarray:
    """decord on one thread; the reader resizes the frames."""
    from decord import VideoReader

    reader = VideoReader(str(path), width=size, height=size, num_threads=1)
    return reader.get_batch(FrameSampler(n_frames).indices(len(reader))).asnumpy()


def decode_with_torchcodec(path: Path, n_frames: int, size: int) -> np.ndarray:
    """torchcodec on one thread with exact seeking; the decoder resizes the frames."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, transforms=[Resize((size, size))])
    clip = decoder.get_frames_at(FrameSampler(n_frames).indices(len(decoder))).data  # (T, C, H, W)
    return clip.permute(0, 2, 3, 1).numpy()


def decode_with_opencv(path: Path, n_frames: int, size: int) -> np.ndarray:
    """OpenCV: grab all frames, retrieve and resize the sampled ones."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    indices, frames = set(FrameSampler(n_frames).indices(count)), []
    for index in range(count):
        if not capture.grab():
            break
        if index in indices:
            _, frame = capture.retrieve()
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def decoders() -> dict[str, Decoder]:
    """The decoders that work here, by name."""
    libraries = {
        "decord": decode_with_decord,
        "torchcodec": decode_with_torchcodec,
        "OpenCV": decode_with_opencv,
    }
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_video(clip, np.zeros((4, 32, 32, 3), np.uint8))
        usable = {n: decode for n, decode in libraries.items() if _works(n, decode, clip)}
    return {"naive PyAV": decode_naively, **usable}


def _works(name: str, decode: Decoder, clip: Path) -> bool:
    """Whether a decoder reads a clip; prints why if it is installed but does not."""
    try:
        decode(clip, 2, 32)
    except ModuleNotFoundError:
        return False
    except Exception as error:  # torchcodec needs the FFmpeg libraries of the system
        print(f"{name} is left out, it does not work here: {first_line(error)}", file=sys.stderr)
        return False
    return True


def onnxruntime_session(
    model: nn.Module, clips: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as onnxruntime runs it, with as many threads as torch, on batches like `clips`."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (clips,), dynamo=True, verbose=False).save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name
    return lambda clips: torch.from_numpy(session.run(None, {name: clips.numpy()})[0])


class NaiveClips(Dataset):
    """Clips as a naive training script reads them: `((T, 3, H, W) float, label)`.

    All frames are decoded and converted, PIL transforms one frame after the other, and the worker
    returns floats.
    """

    def __init__(self, rows: Sequence[ClipRow], n_frames: int, size: int) -> None:
        self.rows = list(rows)
        self.n_frames = n_frames
        self.size = size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        frames = decode_naively(self.rows[index].path, self.n_frames, self.size)
        angle, right, down, scale = (2 * torch.rand(4) - 1).tolist()
        shift = (round(right * 0.05 * self.size), round(down * 0.05 * self.size))
        factors = (1 + 0.4 * (torch.rand(3) - 0.5)).tolist()
        hue = 0.04 * (torch.rand(()).item() - 0.5)
        frames = augment_each_frame(frames, 10 * angle, shift, 1 + 0.1 * scale, *factors, hue)
        return torch.stack([tv.to_tensor(frame) for frame in frames]), self.rows[index].label


def train_naively(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Train one epoch in fp32 with contiguous weights."""
    model.train()
    for clips, labels in batches:
        loss = F.cross_entropy(model(clips.to(device)), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def augment_each_frame(
    frames: np.ndarray,
    angle: float,
    translate: tuple[int, int],
    scale: float,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    """Flip, rotate, jitter and shift each frame with PIL, `(T, H, W, 3)` to the same.

    The parameters are the same for all frames. Drawing them per frame, as naive scripts do, would
    take more time.
    """
    bilinear = InterpolationMode.BILINEAR
    augmented = []
    for frame in frames:
        image = tv.hflip(Image.fromarray(frame))
        image = tv.rotate(image, angle, bilinear)
        image = tv.adjust_brightness(image, brightness)
        image = tv.adjust_contrast(image, contrast)
        image = tv.adjust_saturation(image, saturation)
        image = tv.adjust_hue(image, hue)
        image = tv.affine(image, 0.0, list(translate), scale, [0.0], bilinear)
        augmented.append(np.asarray(image))
    return np.stack(augmented)
