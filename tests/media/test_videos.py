"""Frames of a video: which, when, how they lie, and what is refused."""

import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hostile import refused

from mlx_dgemma.errors import SettingsError
from mlx_dgemma.media import videos
from mlx_dgemma.media.images import ImageBudget
from mlx_dgemma.media.videos import FRAME, read_frames

av = pytest.importorskip("av", reason="needs the extra video")

KINDS = {  # file name -> (codec, pixel format); with and without reordered frames
    "a.mp4": ("libx264", "yuv420p"),
    "b.mp4": ("mpeg4", "yuv420p"),
    "a.mov": ("mjpeg", "yuvj420p"),
    "a.mkv": ("libx264", "yuv420p"),
    "a.webm": ("libvpx-vp9", "yuv420p"),
    "a.avi": ("libx264", "yuv420p"),
}


def painted(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Grey that grows by 2 a frame, with a white first quarter."""
    pixels = np.full((height, width, 3), 2 * number % 256, np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return pixels


def write(
    path: Path,
    frames: int = 75,
    rate: int | Fraction = 30,
    ticks: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    **options: str,
) -> Path:
    """A video of painted frames; `ticks` of a thousandth second where it has none."""
    codec, pixel_format = KINDS.get(path.name, ("mpeg4", "yuv420p"))
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.bit_rate = 4_000_000
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(number, *size), format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: list) -> list[int]:
    """The numbers painted on frames."""
    return [round(float(f.patches[-1].mean()) * 255 / 2) for _, f in frames]


def refusal(path, **options) -> str:
    return refused(lambda: read_frames(path, **options))


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_spread_evenly_and_told_their_time(name, tmp_path):
    path = write(tmp_path / name)
    frames = read_frames(path, fps=2)
    # 2.5 s: five of 75 frames
    assert [s for s, _ in frames] == pytest.approx([0, 0.5, 1, 1.5, 2], abs=0.001)
    assert numbers(frames) == pytest.approx([0, 15, 30, 45, 60], abs=1)
    assert all(p.soft_tokens == 63 for _, p in frames)
    assert [s for s, _ in read_frames(path)] == pytest.approx([0, 37 / 30], abs=0.001)


def test_the_budget_of_a_frame_is_that_of_a_video(tmp_path):
    path = write(tmp_path / "b.mp4", frames=2)
    assert ImageBudget(soft_tokens=70) == FRAME
    ((_, picture),) = read_frames(path)
    assert picture.patches.shape == (63 * 9, 768)
    ((_, picture),) = read_frames(path, ImageBudget(280))
    assert picture.soft_tokens == 266


def test_every_rate_of_a_file_and_of_frames(tmp_path):
    for name, rate in (("b.mp4", 24), ("a.mkv", Fraction(30_000, 1001)), ("b.mp4", 50)):
        frames = read_frames(write(tmp_path / name, frames=round(3 * rate), rate=rate))
        assert [s for s, _ in frames] == pytest.approx([0, 1, 2], abs=0.003)
    frames = read_frames(write(tmp_path / "b.mp4", frames=7), fps=1000)
    assert numbers(frames) == pytest.approx(range(7), abs=1)  # each once
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match=f"fps is {fps}; it must be a number"):
            read_frames("none.mp4", fps=fps)


@pytest.mark.parametrize(
    ("ticks", "times"),
    [
        ([0], [0]),
        # 4 s, and as much again as a frame lasts on average: four of eight
        ([0, 100, 200, 300, 1000, 3000, 3100, 4000], [0, 0.2, 1, 3.1]),
        ([5000 + 100 * number for number in range(20)], [0, 1]),  # from the first one
    ],
)
def test_times_are_those_at_which_frames_are_shown(ticks, times, tmp_path):
    path = write(tmp_path / "a.mkv", frames=len(ticks), ticks=ticks)
    assert [s for s, _ in read_frames(path)] == times


def test_frames_cut_away_by_an_edit_list_do_not_count(tmp_path):
    data = bytearray(write(tmp_path / "b.mp4").read_bytes())
    at = data.index(b"elst") + 12
    assert struct.unpack(">Ii", data[at : at + 8]) == (2500, 0)
    data[at : at + 8] = struct.pack(">Ii", 1500, 15_360)  # 1.5 s, from 1 s on
    (tmp_path / "b.mp4").write_bytes(data)
    frames = read_frames(tmp_path / "b.mp4", fps=2)
    assert [seconds for seconds, _ in frames] == [0, 0.5, 1]
    assert numbers(frames) == pytest.approx([30, 45, 60], abs=1)


def test_slides_are_shown_for_long_the_last_one_too(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(painted(9 * number), format="rgb24")
            frame.pts = 5 * number
            for packet in stream.encode(frame):
                packet.duration = 5 if number < 2 else 30
                container.mux(packet)
    frames = read_frames(tmp_path / "a.mov")
    assert [seconds for seconds, _ in frames] == [0, 5, 10]
    assert numbers(frames) == pytest.approx([0, 9, 18], abs=1)


MATRICES = {  # degrees clockwise -> display matrix, where the first quarter goes
    0: ([1, 0, 0, 1], (0, 0)),
    90: ([0, 1, -1, 0], (1, 0)),
    180: ([-1, 0, 0, -1], (1, 1)),
    270: ([0, -1, 1, 0], (0, 1)),
}


@pytest.mark.parametrize("degrees", MATRICES)
def test_frames_are_turned_as_players_turn_them(degrees, tmp_path):
    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        one = 2**16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 2**30)

    path = write(tmp_path / "b.mp4", frames=1)
    data = path.read_bytes()
    at = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
    entries, quarter = MATRICES[degrees]
    path.write_bytes(data[:at] + matrix(*entries) + data[at + 36 :])
    ((_, picture),) = read_frames(path)
    right, bottom = picture.positions.max(axis=0)
    assert (right > bottom) == (degrees in (0, 180))
    bright = picture.positions[picture.patches.mean(axis=1) > 0.9]
    assert (bright.mean(axis=0) > (right / 2, bottom / 2)).tolist() == list(quarter)


NO_VIDEO = ": no MP4, MOV, MKV, WebM or AVI, or broken; convert it or download it again"
FILES = {
    "text": b"hello " * 99,
    "empty": b"",
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n",
    "concatenation": b"ffconcat version 1.0\nfile 'b.mp4'\n",
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\n",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
}


def test_what_is_no_video_is_refused(tmp_path):
    write(tmp_path / "b.mp4", frames=1)
    for kind, data in FILES.items():
        (tmp_path / kind).write_bytes(data)
        assert refusal(tmp_path / kind).endswith(f"/{kind}{NO_VIDEO}")
    large = tmp_path / "large.mp4"
    large.touch()
    os.truncate(large, videos.MAX_BYTES + 1)
    assert refusal(large).endswith(": larger than 500 MB; make it smaller")
    assert refusal("http://127.0.0.1/x.mp4").startswith("http: sources are not fetched")


def test_sound_alone_and_unknown_codecs_are_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refusal(path).endswith("sound.mp4: holds no video")
    path = write(tmp_path / "a.mov", frames=1)
    path.write_bytes(path.read_bytes().replace(b"jpeg", b"zzzz"))
    assert refusal(path).endswith("made with an unknown codec; convert it to H.264")


def test_a_video_too_long_or_too_large_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "b.mp4", frames=100, rate=10)
    assert len(read_frames(path, max_seconds=9)) == 10
    message = refusal(path, max_seconds=8)
    assert message.endswith("b.mp4: 10 s long; at most 8 s: cut it")
    far = write(tmp_path / "a.mkv", frames=2, ticks=[0, 10**9])
    assert refusal(far).endswith("a.mkv: 1000000 s long; at most 60 s: cut it")
    path = write(tmp_path / "a.mkv", frames=500, ticks=list(range(500)))
    assert "more than 240 frames a second for 1 s" in refusal(path, max_seconds=1)
    path = write(tmp_path / "b.mp4", frames=300, rate=100)
    message = refusal(path, fps=100)
    assert message.endswith("300 frames at 100 a second; at most 256: ask for fewer")
    path = write(tmp_path / "b.mp4", frames=1)
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 48 - 1)
    assert "b.mp4: frames of 64 x 48 pixels; at most" in refusal(path)


@pytest.mark.parametrize("name", ["b.mp4", "a.mkv", "a.webm", "a.avi"])
def test_a_truncated_video_is_refused(name, tmp_path):
    # the index first, so that what is cut off are frames
    options = {"movflags": "faststart"} if name == "b.mp4" else {}
    path = write(tmp_path / name, frames=100, rate=10, **options)
    data = path.read_bytes()
    for part in (0.3, 0.7):
        path.write_bytes(data[: int(part * len(data))])
        early = f"{name}: ends early, truncated or broken; download it again"
        assert refusal(path).endswith(early if name != "a.avi" else (early, NO_VIDEO))


def test_a_decoder_that_gives_too_few_frames_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path / "b.mp4")
    frames = videos._frames
    monkeypatch.setattr(videos, "_frames", lambda *a: list(frames(*a))[:-1])
    assert "b.mp4: ends early" in refusal(path)


def test_without_pyav_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "av.error", None)
    assert refusal("a.mp4") == (
        "reading a video needs PyAV: pip install 'mlx-dgemma[video]'"
    )
