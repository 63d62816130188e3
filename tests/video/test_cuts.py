"""Files that were cut, as downloads are that broke off, are named; those that only look so are read."""

import av
import numpy as np
import pytest
import torch
from grey_videos import write_timed_video

from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.facts import Traits


CODECS = {
    **{"mkv": "libx264", "webm": "libvpx-vp9", "avi": "mjpeg", "flv": "flv", "wmv": "wmv2", "ogg": "libvpx"},
    **{
        "mp4": "libx264",
        "ts": "libx264",
        "mpg": "mpeg2video",
        "gif": "gif",
        "h264": "libx264",
        "mjpeg": "mjpeg",
        "m4v": "mpeg4",
    },
}
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}
FORMATS = {"mkv": "matroska", "wmv": "asf", "ts": "mpegts", "mpg": "mpeg"}
SOUNDS = {
    **{"mkv": "aac", "webm": "libopus", "avi": "mp3", "flv": "aac", "mp4": "aac", "ts": "aac", "mpg": "mp2"},
    "wmv": "wmav2",
}
NUM_FRAMES = 12


class Pipe:
    """Takes what is written, and lets nobody go back to the start of it."""

    def __init__(self, path):
        self.path = path
        path.write_bytes(b"")

    def write(self, content):
        with self.path.open("ab") as file:
            return file.write(content)


def write_noise(path, *, seconds_of_sound=0, piped=False, gop=None, **options):
    """Frames that take some bytes each, and perhaps sound."""
    ending = path.suffix[1:]
    codec = CODECS[ending]
    target = Pipe(path) if piped else str(path)
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    with av.open(target, "w", format=FORMATS.get(ending, ending), options=options) as container:
        stream = container.add_stream(codec, rate=25, height=48, width=80)
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        if gop:
            stream.gop_size, stream.max_b_frames = gop, 0
        sound = container.add_stream(SOUNDS[ending], rate=48000) if seconds_of_sound else None
        if ending == "wmv" and sound is not None:
            sound.bit_rate, sound.layout = 64000, "mono"
        for index in range(NUM_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, index, 0), format="rgb24")))
        container.mux(stream.encode())
        for start in range(0, round(48000 * seconds_of_sound), 960):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(sound.encode(frame))
        if sound is not None:
            container.mux(sound.encode())
    return path


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def write_cuttable(path):
    """An mp4 with its index at the start, or in fragments; others as they are."""
    if path.name == "fragments.mp4":
        return write_noise(path, movflags="frag_every_frame+empty_moov")
    return write_noise(path, **({"movflags": "faststart"} if path.suffix == ".mp4" else {}))


PROMISING = ("a.mkv", "a.webm", "a.avi", "a.flv", "a.wmv", "a.ogg", "a.mp4", "fragments.mp4", "a.gif")


@pytest.mark.parametrize("share", [0.6, 0.7, 0.85])
@pytest.mark.parametrize("name", PROMISING)
def test_a_cut_file_ends_before_its_header_says(tmp_path, name, share):
    path = write_cuttable(tmp_path / name)
    assert probe_video(path)[:2] == (NUM_FRAMES, pytest.approx(25))
    cut(path, min(share, 0.7) if name == "a.wmv" else share)  # the rest of that one is padding
    with pytest.raises(ValueError, match=rf"{name} ends before frame \d+, which its header promises; copy or"):
        probe_video(path)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.flv", "a.wmv", "a.mp4"])
def test_a_file_of_which_only_the_beginning_is_left_was_cut(tmp_path, name):
    path = write_noise(tmp_path / name)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="the file was cut: "):
        probe_video(path)


def test_an_mp4_that_lost_the_index_at_its_end_is_told_from_one_that_is_empty(tmp_path):
    for share in (0.9, 0.5):
        with pytest.raises(ValueError, match=r"the file was cut: its index \(moov\), without which nothing can be"):
            probe_video(cut(write_noise(tmp_path / "a.mp4"), share))
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^the file is empty$"):
        probe_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("ending", SOUNDS)
def test_sound_may_be_longer_than_pictures(tmp_path, ending):
    path = write_noise(tmp_path / f"a.{ending}", seconds_of_sound=3)
    with av.open(str(path)) as container:
        assert ending in ("ts", "mpg") or container.duration > 2.9e6
    facts = probe_video(path)
    assert facts.num_frames == NUM_FRAMES
    assert ending == "avi" or facts.frame_rate == pytest.approx(25, rel=0.01)  # this avi's header counts 13 frames
    assert not facts.traits & Traits.VARIABLE_RATE


@pytest.mark.parametrize("lost", [50, 150, 2000])
def test_a_wmv_that_lost_only_bytes_behind_its_last_frame_has_all_of_them(tmp_path, lost):
    """Its index, or padding; after a greater share FFmpeg knows no duration of it."""
    path = write_noise(tmp_path / "a.wmv")
    path.write_bytes(path.read_bytes()[:-lost])
    with av.open(str(path)) as container:
        assert (container.duration is None) == (lost == 2000)
    assert probe_video(path)[:2] == (NUM_FRAMES, 25)


def test_a_wmv_with_sound_that_lost_only_bytes_behind_its_last_frame_has_all_of_them(tmp_path):
    path = write_noise(tmp_path / "a.wmv", seconds_of_sound=0.48)
    path.write_bytes(path.read_bytes()[:-150])
    assert probe_video(path).num_frames == NUM_FRAMES


@pytest.mark.parametrize("ending", ["mkv", "webm", "flv", "wmv", "ogg", "ts", "mpg"])
def test_files_that_were_written_as_they_came_state_no_size_and_are_read(tmp_path, ending):
    assert probe_video(write_noise(tmp_path / f"a.{ending}", piped=True))[:2] == (NUM_FRAMES, pytest.approx(25))


def test_an_flv_of_a_recording_that_was_killed_is_read_as_far_as_it_goes(tmp_path):
    path = write_noise(tmp_path / "a.flv", piped=True)
    path.write_bytes(path.read_bytes()[:-2])  # within the length behind the last frame
    assert probe_video(path).num_frames == NUM_FRAMES


@pytest.mark.parametrize("ending", ["mkv", "webm", "flv", "mov"])
def test_a_last_frame_may_be_shown_for_long(tmp_path, ending):
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    path = write_timed_video(tmp_path / f"a.{ending}", [0, 40, 80, 3000], hold=5000, codec=codec)
    assert probe_video(path).num_frames == 4


def test_an_avi_that_lost_its_index_alone_has_all_its_frames(tmp_path):
    path = write_noise(tmp_path / "a.avi")
    path.write_bytes(path.read_bytes()[:-100])
    assert probe_video(path)[:2] == (NUM_FRAMES, 25)


def test_a_stream_that_lacks_frames_before_its_last_one_ends_before_them(tmp_path):
    """Nothing in a transport stream says how long it is, but frames decoded later are to be shown before others."""
    path = write_noise(tmp_path / "a.ts")
    packets = packets_of(path)
    first_late = next(number for number in range(2, NUM_FRAMES) if packets[number].pts < packets[number - 1].pts)
    path.write_bytes(path.read_bytes()[: packets[first_late].pos])
    facts = probe_video(path)
    assert 0 < facts.num_frames < first_late
    assert not facts.traits & Traits.VARIABLE_RATE
    assert len(decode_frames(path, torch.arange(facts.num_frames))) == facts.num_frames


@pytest.mark.parametrize("share", [0.85, 0.9, 0.97])
@pytest.mark.parametrize("ending", ["ts", "mpg", "h264", "m4v", "mjpeg"])
def test_a_recording_that_was_torn_is_as_long_as_its_whole_frames(tmp_path, ending, share):
    whole = write_noise(tmp_path / f"whole.{ending}", gop=8 if ending == "mpg" else None)
    expected = decode_frames(whole, torch.arange(NUM_FRAMES))
    path = tmp_path / f"a.{ending}"
    path.write_bytes(whole.read_bytes())
    cut(path, share)
    num_frames = probe_video(path).num_frames
    assert 0 < num_frames <= NUM_FRAMES
    assert torch.equal(decode_frames(path, torch.arange(num_frames)), expected[:num_frames])
    with pytest.raises(ValueError, match=rf"ends before frame {NUM_FRAMES}, which is wanted of it; copy or"):
        decode_frames(whole, torch.tensor([NUM_FRAMES]))


# --- damage ----------------------------------------------------------------------------------------------------------


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def read_each(path, num_frames):
    """Frames that decode, and errors of those that do not, by their index."""
    frames, errors = {}, {}
    for index in range(num_frames):
        try:
            frames[index] = decode_frames(path, torch.tensor([index]))
        except ValueError as error:
            errors[index] = str(error)
    return frames, errors


def test_frames_after_a_damaged_one_are_damaged_until_the_next_key_frame(tmp_path):
    path = write_noise(tmp_path / "a.h264", gop=4)
    packets, content = packets_of(path), bytearray(path.read_bytes())
    damaged = next(packet for packet in packets[5:] if not packet.is_keyframe)
    content[damaged.pos + damaged.size // 2 : damaged.pos + damaged.size] = bytes(damaged.size - damaged.size // 2)
    path.write_bytes(content)
    assert probe_video(path).num_frames == NUM_FRAMES  # only what is torn at the end is left out
    frames, errors = read_each(path, NUM_FRAMES)
    assert {0, 1, 2, 3, 8, 9, 10, 11} <= frames.keys()
    assert 5 in errors
