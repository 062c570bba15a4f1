"""Frames of a video as pictures, each with its time. Needs PyAV, the extra "video".

The model reads a video as frames, each behind its time as text. Which frames are taken,
and their budget, is as in transformers' video processor.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from ..errors import MediaError, SettingsError
from .images import ImageBudget, Picture, fit, open_file, shown

if TYPE_CHECKING:
    from av.container import InputContainer

FRAME = ImageBudget(soft_tokens=70)
MAX_BYTES = 500 * 2**20
MAX_PIXELS = 8192 * 4320  # of one frame
MAX_FRAMES = 256  # returned; a frame is 2 MB at 70 soft tokens, 31 MB at 1120
MAX_RATE = 240  # frames a second in the file, all of which may have to be decoded
# MP4 is one of mov, WebM of matroska; playlists would name other files and addresses
FORMATS = "mov,matroska,avi"
MICROSECONDS = 1_000_000
SLACK = Fraction(1, 500)  # seconds; containers round times to a millisecond


def read_frames(
    path: str | Path,
    budget: ImageBudget = FRAME,
    fps: float = 1.0,
    max_seconds: int = 60,
) -> list[tuple[float, Picture]]:
    """Return (seconds from the start, frame) of a video, `fps` of them a second,
    evenly spread over its frames; at least one, and no frame twice.

    MP4, MOV, MKV, WebM and AVI are read. Frames are turned as players turn them.

    Raises MediaError, one line naming the file, also for a video of more than
    `max_seconds` and where PyAV is missing; SettingsError for an impossible rate.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise SettingsError(f"fps is {fps}; it must be a number above 0")
    try:
        from av.error import FFmpegError
    except ImportError:
        needs = "reading a video needs PyAV: pip install 'mlx-dgemma[video]'"
        raise MediaError(needs) from None
    name = shown(path)
    with open_file(path, MAX_BYTES) as file:
        try:
            times = _times(file, name, max_seconds)
            chosen = _choose(times, fps)
            if len(chosen) > MAX_FRAMES:
                raise MediaError(
                    f"{name}: {len(chosen)} frames at {fps:g} a second; at most "
                    f"{MAX_FRAMES}: ask for fewer"
                )
            pictures = [fit(frame, budget) for frame in _frames(file, name, chosen)]
        except (FFmpegError, OSError):  # OSError: a seek to before the beginning
            raise MediaError(
                f"{name}: no MP4, MOV, MKV, WebM or AVI, or broken; convert it or "
                "download it again"
            ) from None
    if len(pictures) < len(chosen):
        raise _truncated(name)
    seconds = [float(times[index] - times[0]) for index in chosen]
    return list(zip(seconds, pictures, strict=True))


def _choose(times: list[Fraction], fps: float) -> list[int]:
    """Frames to take, by transformers' rule for a rate."""
    span = times[-1] - times[0]
    seconds = span * len(times) / max(len(times) - 1, 1)  # the last one is shown too
    count = math.floor((seconds + SLACK) * Fraction(fps))
    count = min(max(count, 1), len(times))
    return [number * len(times) // count for number in range(count)]


def _open(file: BinaryIO) -> "InputContainer":
    """The container from its start."""
    import av

    file.seek(0)
    options = {"format_whitelist": FORMATS}
    return av.open(file, "r", container_options=options, metadata_errors="replace")


def _times(file: BinaryIO, name: str, max_seconds: int) -> list[Fraction]:
    """When each frame is shown, seconds; nothing is decoded for it."""
    with _open(file) as container:
        if not container.streams.video:
            raise MediaError(f"{name}: holds no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(f"{name}: made with an unknown codec; convert it to H.264")
        _check_size(name, stream.width, stream.height)
        ticks, end = [], 0
        for packet in container.demux(stream):
            tick = packet.dts if packet.pts is None else packet.pts
            if tick is not None and not packet.is_discard:
                ticks.append(tick)
                end = max(end, tick + (packet.duration or 0))
            if len(ticks) > MAX_RATE * (max_seconds + 1):
                raise MediaError(
                    f"{name}: more than {MAX_RATE} frames a second for "
                    f"{max_seconds} s; cut it or lower its rate"
                )
        unit = stream.time_base or Fraction(1)
        declared = (stream.duration or 0) * unit
        if not declared and len(container.streams) == 1:  # sound may go on for longer
            declared = Fraction(container.duration or 0, MICROSECONDS)
        missing = declared - end * unit
    if not ticks:
        raise _truncated(name)
    times = [tick * unit for tick in sorted(ticks)]
    seconds = times[-1] - times[0]
    if seconds >= max_seconds + 1:
        raise MediaError(
            f"{name}: {float(seconds):.0f} s long; at most {max_seconds} s: cut it"
        )
    if missing > 1:  # headers are not exact
        raise _truncated(name)
    return times


def _frames(file: BinaryIO, name: str, chosen: list[int]) -> Iterator[Image.Image]:
    """The chosen frames, upright in RGB; fewer where the file ends early."""
    with _open(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        wanted = set(chosen)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                _check_size(name, frame.width, frame.height)
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                turn = frame.rotation if frame.rotation % 90 == 0 else 0
                yield image.rotate(turn, expand=True)
            if index == chosen[-1]:
                return


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name}: frames of {width} x {height} pixels; at most "
            f"{MAX_PIXELS // 10**6} million: make it smaller"
        )


def _truncated(name: str) -> MediaError:
    return MediaError(f"{name}: ends early, truncated or broken; download it again")
