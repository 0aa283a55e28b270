"""Tests that videos, cameras and streams get the labels of `apcnet.predict` on every frame, at the same times."""

import os
import signal
import socket
import struct
import threading
from fractions import Fraction

import numpy as np
import pytest
from full_disk import limited
from PIL import Image
from stand_in import Network, draw_image, picture

import apcnet
from apcnet.bulk.video import predict_video

av = pytest.importorskip("av")
videofile = pytest.importorskip("apcnet.bulk.videofile")

pytestmark = pytest.mark.usefixtures("one_thread")

SCENE = np.asarray(picture(draw_image(27, 40)).resize((120, 80), Image.Resampling.BILINEAR))
QUARTER_CLOCKWISE = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)


@pytest.fixture
def network():
    return Network()


def write(path, count=12, size=(48, 64), times=None, form=None, sound=None, rate=10, **colors):
    """Writes a video of a window that moves over a scene, and returns its path."""
    with av.open(str(path), "w", format=form) as file:
        encoder = "libvpx-vp9" if str(path).endswith("webm") else "libx264"
        stream = file.add_stream(encoder, rate=rate, options={"g": "4"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in colors.items():
            setattr(stream.codec_context, name, value)
        if sound:
            voice = file.add_stream(sound, rate=48000)
            voice.layout = "mono"
            wave = np.sin(np.arange(48000 * count // rate, dtype=np.float32) / 20)[None]
            tone = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 48000, 0, Fraction(1, 48000)
            resampler = av.AudioResampler(voice.format, "mono", 48000, voice.codec_context.frame_size or 1024)
            for part in [*resampler.resample(tone), *resampler.resample(None)]:
                file.mux(voice.encode(part))
            file.mux(voice.encode())
        for i, time in enumerate(times or range(0, 1000 // rate * count, 1000 // rate)):
            window = SCENE[i % 16 : i % 16 + size[0], 2 * i % 32 : 2 * i % 32 + size[1]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def frames_of(path):
    """Decodes a video: pairs of seconds and levels (H, W, 3)."""
    with av.open(str(path)) as file:
        start = Fraction(file.start_time, av.time_base)
        return [(f.pts * f.time_base - start, f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]


def sound_of(path):
    """Returns the packets of the sound of a video, with their seconds after its first frame."""
    with av.open(str(path)) as file:
        start = min(float(p.pts * p.time_base) for p in file.demux(video=0) if p.pts is not None)
        file.seek(0)
        return [(float(p.pts * p.time_base) - start, bytes(p)) for p in file.demux(audio=0) if p.pts is not None]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63)], ids=["even", "odd"])
def test_every_frame_is_predicted(network, tmp_path, name, size):
    """Tests labels, times, the size, and that the picture is the overlay as far as the codec keeps it."""
    source = write(tmp_path / name, size=size)
    labels, out, seen = tmp_path / "labels", tmp_path / f"out_{name}", []
    report = predict_video(network, source, out, labels=labels, progress=lambda *given: seen.append(given))
    frames, drawn = frames_of(source), frames_of(out)
    assert report == (12, [], False) and seen[-1] == (12, 12 if name[2:] in ("mp4", "mov") else None)
    assert [time for time, _ in drawn] == [time for time, _ in frames] == [Fraction(i, 10) for i in range(12)]
    for number, ((_, levels), (_, drawing)) in enumerate(zip(frames, drawn, strict=True)):
        expected = apcnet.predict(network, levels)
        assert np.array_equal(np.asarray(Image.open(labels / f"{number:06}.png")), expected.labels.numpy())
        overlay = np.asarray(expected.overlay(legend=False)).astype(int)
        assert drawing.shape == levels.shape and np.abs(drawing - overlay).mean() < 6
        assert np.abs(drawing - levels.astype(int)).mean() > 20
    assert {path.name for path in tmp_path.iterdir()} == {name, "labels", f"out_{name}"}


@pytest.mark.parametrize("protocol", [apcnet.inference.Protocol(flip=True, window=(32, 32), stride=(20, 20))])
def test_labels_of_some_frames_under_a_protocol(network, tmp_path, protocol):
    source, labels = write(tmp_path / "a.mp4"), tmp_path / "labels"
    predict_video(network, source, tmp_path / "b.mp4", protocol, labels=labels, every=5)
    assert sorted(path.name for path in labels.iterdir()) == ["000000.png", "000005.png", "000010.png"]
    _, levels = frames_of(source)[10]
    expected = apcnet.predict(network, levels, protocol).labels
    assert np.array_equal(np.asarray(Image.open(labels / "000010.png")), expected.numpy())


@pytest.mark.parametrize("source_form", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("out_form", ["mp4", "mkv"])
def test_variable_frame_rates_and_late_starts_are_kept(network, tmp_path, source_form, out_form):
    times = [0, 40, 90, 400, 410, 1000, 1700]
    source = write(tmp_path / f"a.{source_form}", times=times)
    predict_video(network, source, tmp_path / f"b.{out_form}")
    kept = [round(1000 * time) for time, _ in frames_of(tmp_path / f"b.{out_form}")]
    assert kept == times == [round(1000 * time) for time, _ in frames_of(source)]


def test_frames_are_turned_upright(network, tmp_path):
    """Tests the matrix of a telephone that is held upright: a player turns the picture clockwise."""
    source = write(tmp_path / "a.mp4", count=3)
    content = source.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    source.write_bytes(content[:at] + QUARTER_CLOCKWISE + content[at + 36 :])
    predict_video(network, source, tmp_path / "b.mp4", opacity=0, labels=tmp_path / "labels")
    turned = np.ascontiguousarray(np.rot90(frames_of(source)[0][1], -1))
    _, drawn = frames_of(tmp_path / "b.mp4")[0]
    assert drawn.shape == (64, 48, 3) and np.abs(drawn - turned.astype(int)).mean() < 6
    labels = np.asarray(Image.open(tmp_path / "labels" / "000000.png"))
    assert np.array_equal(labels, apcnet.predict(network, turned).labels.numpy())


@pytest.mark.parametrize(("sound", "source", "out"), [("aac", "a.mp4", "b.mkv"), ("mp2", "a.ts", "b.mp4")])
def test_sound_is_copied(network, tmp_path, sound, source, out):
    write(tmp_path / source, sound=sound)
    assert predict_video(network, tmp_path / source, tmp_path / out) == (12, [], False)
    before, after = sound_of(tmp_path / source), sound_of(tmp_path / out)
    assert len(before) > 30 and [content for _, content in after] == [content for _, content in before]
    assert max(abs(late - early) for (early, _), (late, _) in zip(before, after, strict=True)) < 0.0011


def test_sound_that_does_not_fit_is_left_out_with_a_warning(network, tmp_path):
    source = write(tmp_path / "a.mp4", sound="aac", count=2)
    with pytest.warns(UserWarning, match="webm: has no sound, since it cannot hold aac"):
        predict_video(network, source, tmp_path / "b.webm")
    assert len(frames_of(tmp_path / "b.webm")) == 2


@pytest.mark.parametrize(("tags", "matrix"), [({"colorspace": 1, "color_primaries": 1, "color_trc": 1}, 1), ({}, 2)])
def test_colors_are_kept(network, tmp_path, tags, matrix):
    source = write(tmp_path / "a.mp4", count=2, **tags)
    predict_video(network, source, tmp_path / "b.mp4", opacity=0)
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert next(file.decode(video=0)).colorspace == matrix
    for (_, before), (_, after) in zip(frames_of(source), frames_of(tmp_path / "b.mp4"), strict=True):
        assert np.abs(after.astype(int) - before).mean() < 3


def test_shape_of_pixels_is_kept(network, tmp_path):
    source = write(tmp_path / "a.mp4", count=2, sample_aspect_ratio=Fraction(4, 3))
    predict_video(network, source, tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize("size", [(48, 64), (47, 63)], ids=["even", "odd"])
def test_other_encoders(network, tmp_path, monkeypatch, size):
    """Tests what happens where PyAV has no H.264: MPEG-4, whose clock is coarser, or an error."""
    source = write(tmp_path / "a.ts", size=size)
    monkeypatch.setattr(videofile, "ENCODERS", {"h264": ("libnone", "mpeg4")})
    with pytest.warns(UserWarning, match="MPEG-4"):
        predict_video(network, source, tmp_path / "b.mp4")
    drawn = frames_of(tmp_path / "b.mp4")
    assert [round(10 * time, 3) for time, _ in drawn] == list(range(12)) and drawn[0][1].shape == (*size, 3)
    monkeypatch.setattr(videofile, "ENCODERS", {"h264": ("libnone",)})
    with pytest.raises(ValueError, match=r"c.mp4: expected PyAV with one of the encoders libnone"):
        predict_video(network, source, tmp_path / "c.mp4")


@pytest.fixture
def endless(tmp_path):
    """Makes a pipe that plays a video again and again until nobody reads it, as a camera does."""
    pipe, clip = tmp_path / "pipe", write(tmp_path / "clip.ts", count=200, form="mpegts").read_bytes()
    os.mkfifo(pipe)

    def play():
        with open(pipe, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(clip)
            except BrokenPipeError:
                pass

    player = threading.Thread(target=play)
    player.start()
    yield pipe
    player.join(10)
    assert not player.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_stream_with_a_whole_video(network, tmp_path, endless, number):
    before = signal.getsignal(number)

    def interrupt(done, total):
        if done == 30:
            os.kill(os.getpid(), number)

    report = predict_video(network, endless, tmp_path / "b.mp4", progress=interrupt)
    assert report.stopped and report.frames in (30, 31) and not report.failures
    assert len(frames_of(tmp_path / "b.mp4")) == report.frames and signal.getsignal(number) is before


def test_stop_ends_a_stream_but_drops_a_file(network, tmp_path, endless):
    asked = iter([False] * 9 + [True])
    assert predict_video(network, endless, tmp_path / "b.mkv", stop=lambda: next(asked)) == (10, [], True)
    assert len(frames_of(tmp_path / "b.mkv")) == 10
    write(tmp_path / "a.mp4")
    assert predict_video(network, tmp_path / "a.mp4", tmp_path / "c.mp4", stop=lambda: True) == (1, [], True)
    assert not (tmp_path / "c.mp4").exists() and not list(tmp_path.glob(".*"))


def test_a_camera_is_read_by_its_driver(network, tmp_path, monkeypatch):
    """Tests a driver that makes pictures instead of a camera's."""
    if "lavfi" not in av.formats_available:
        pytest.skip("needs a PyAV with the device lavfi")
    assert videofile._address(3) == ("/dev/video3", "v4l2") == videofile._address("/dev/video3")
    monkeypatch.setattr(videofile, "_address", lambda source: ("testsrc2=size=64x48:rate=5", "lavfi"))
    report = predict_video(network, 3, tmp_path / "b.mp4", stop=lambda: len(network.seen) == 7)
    assert report == (7, [], True)
    assert [time for time, _ in frames_of(tmp_path / "b.mp4")] == [Fraction(i, 5) for i in range(7)]


def test_a_stream_that_falls_silent(network, tmp_path, monkeypatch):
    """Tests that its frames are written, and that the report says why there are no more."""
    monkeypatch.setattr(videofile, "TIMEOUT", 1.0)
    clip = write(tmp_path / "clip.ts", count=60, form="mpegts").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.sendall(clip)
                connection.recv(1)  # until the reader has left

        thread = threading.Thread(target=serve)
        thread.start()
        report = predict_video(network, f"tcp://127.0.0.1:{server.getsockname()[1]}", tmp_path / "b.mp4")
        thread.join(10)
    assert not report.stopped and len(frames_of(tmp_path / "b.mp4")) == report.frames > 50
    assert f"cannot be read after {report.frames} frames" in report.failures[0]


def test_frames_without_times_get_those_of_the_rate(network, tmp_path):
    source = write(tmp_path / "a.h264", form="h264", rate=25, times=range(0, 480, 40))
    predict_video(network, source, tmp_path / "b.mp4")
    assert [time for time, _ in frames_of(tmp_path / "b.mp4")] == [Fraction(i, 25) for i in range(12)]


def test_keyboard_interrupt_leaves_nothing_of_a_file(network, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    write(tmp_path / "a.mp4")
    with pytest.raises(KeyboardInterrupt):
        predict_video(network, tmp_path / "a.mp4", tmp_path / "b.mp4", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("form", ["mp4", "mkv", "ts"])
def test_truncated_files(network, tmp_path, form):
    """Tests that frames before the end are there; MPEG-TS does not say how long it is, so its end may go unnoticed."""
    source = write(tmp_path / f"a.{form}", count=40, form="mpegts" if form == "ts" else None)
    if form == "mp4":  # with its index in front
        predict_video(network, source, tmp_path / "whole.mp4", opacity=0)
        source = tmp_path / "whole.mp4"
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    report = predict_video(network, source, tmp_path / "b.mp4")
    assert 2 <= report.frames < 38 and not report.stopped
    assert len(frames_of(tmp_path / "b.mp4")) == report.frames
    if form != "ts":
        assert any(f"{source}: ends early, after {report.frames} frames" in failure for failure in report.failures)


def test_damaged_frames_are_reported(network, tmp_path):
    source = write(tmp_path / "a.mkv", count=40)
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as file:
        damaged = [(p.pos, p.size) for p in file.demux(video=0) if p.pts is not None][10:14]
    for position, size in damaged:
        content[position + 20 : position + size] = bytes(size - 20)
    source.write_bytes(content)
    report = predict_video(network, source, tmp_path / "b.mp4")
    (failure,) = report.failures
    assert "damaged" in failure and f"{report.frames} are predicted" in failure and str(source) in failure
    assert len(frames_of(tmp_path / "b.mp4")) == report.frames >= 30


def test_frames_of_another_size_end_a_stream(network, tmp_path):
    parts = [
        write(tmp_path / f"{i}.ts", count=8, size=size).read_bytes() for i, size in enumerate(((48, 64), (32, 48)))
    ]
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    report = predict_video(network, tmp_path / "a.ts", tmp_path / "b.mp4")
    assert report.frames == 8 and "the size of its frames changes from (48, 64) to (32, 48)" in report.failures[0]


def test_memory_does_not_grow_with_the_length(network, tmp_path, monkeypatch):
    """Tests that few frames wait between reading, network and writing, wherever it is slow."""
    live, most = set(), []

    class Counted(np.ndarray):
        def __new__(cls, levels):
            counted = levels.view(cls)
            live.add(id(counted))
            most.append(len(live))
            return counted

        def __del__(self):
            live.discard(id(self))

    def counted(reader, decoded):
        levels, time = read(reader, decoded)
        return videofile.Frame(Counted(levels), time)

    read = videofile.Reader._frame
    monkeypatch.setattr(videofile.Reader, "_frame", counted)
    source = write(tmp_path / "a.mp4", count=120)
    assert predict_video(network, source, tmp_path / "b.mp4").frames == 120
    assert len(most) == 120 and max(most) <= 12, max(most)


def test_full_disk(network, tmp_path):
    source = write(tmp_path / "a.mp4")
    predict_video(network, source, tmp_path / "b.mp4")
    whole = (tmp_path / "b.mp4").read_bytes()
    for share in (0.3, 0.8):
        with limited(int(share * len(whole))), pytest.raises(OSError, match=r"b\.mp4: cannot be written"):
            predict_video(network, source, tmp_path / "b.mp4")
        assert (tmp_path / "b.mp4").read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


def test_wrong_sources(network, tmp_path):
    out = tmp_path / "b.mp4"
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        voice = file.add_stream("pcm_s16le", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        tone.sample_rate = 8000
        file.mux(voice.encode(tone))
    for source, message in (
        (tmp_path / "none.mp4", "there is no such file"),
        (63, "camera 63: there is no such file or device"),
        ("/dev/video63", "/dev/video63: there is no such file or device"),
        (text, r"text\.mp4: expected a video that FFmpeg reads \(Invalid data found when processing input\)"),
        (tmp_path / "sound.wav", "expected a video, found none in it"),
        ("tcp://127.0.0.1:1", "expected a video that FFmpeg reads"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            predict_video(network, source, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "b.avi"}, r"out: expected a name that ends with one of \.mp4"),
        ({"out": "a.mp4"}, "out: .* is the video that is read"),
        ({"out": "none/b.mp4"}, "expected a file in an existing folder"),
        ({"opacity": 1.5}, "opacity: expected 0 to 1, got 1.5"),
        ({"every": 0}, "every: expected a positive integer, got 0"),
        ({"labels": "a.mp4"}, "labels: expected a folder"),
        ({"max_pixels": 0}, "max_pixels: expected a positive integer"),
        ({"precision": "int8"}, "precision"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(network, tmp_path, arguments, message):
    write(tmp_path / "a.mp4", count=2)
    given = {"out": "b.mp4", **arguments}
    for name in ("out", "labels"):
        if name in given:
            given[name] = tmp_path / given[name]
    with pytest.raises((ValueError, OSError), match=message):
        predict_video(network, tmp_path / "a.mp4", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_models_of_other_channels_are_an_error(tmp_path):
    model = apcnet.create("fcn", backbone="tiny", num_classes=3, in_channels=4)
    model.mean, model.std, model.range = (9.0,) * 4, (9.0,) * 4, ((0.0, 99.0),) * 4
    with pytest.raises(ValueError, match="expected 4 channels, as the model was trained with"):
        predict_video(model, write(tmp_path / "a.mp4", count=2), tmp_path / "b.mp4")
