"""Video files: what is read of them; a malicious one reaches no other file, and takes no more than the limits."""

import gc
import http.server
import multiprocessing
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from datasets import Dataset
from grey_videos import shown_indices, write_playlists, write_video

from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import EmbeddedVideo, open_video
from causal_wan.video.paths import resolve_path


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "0.mp4")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_frames_that_an_edit_list_hides_are_not_counted(clip, tmp_path):
    """What cutting half a second off without encoding anew leaves: 24 frames in the file, 16 shown."""
    path = tmp_path / "cut.mp4"
    with av.open(str(clip)) as source, av.open(str(path), "w") as cut:
        stream = source.streams.video[0]
        copy, start = cut.add_stream_from_template(stream), int(0.5 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                cut.mux(packet)
    assert probe_video(path) == (16, 16.0, 48, 80, 0)
    assert shown_indices(decode_frames(path, torch.arange(16))) == list(range(8, 24))


def test_a_phone_held_upright_gives_upright_frames(tmp_path):
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:, :40] = 255  # the left half, which turns up when the header says to turn clockwise
    path = write_video(tmp_path / "phone.mp4", frames=[picture] * 2, num_frames=2)
    header = bytearray(path.read_bytes())
    matrix = header.find(b"tkhd") + 44
    header[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(header)
    (frame,) = decode_frames(path, torch.tensor([0]))
    assert frame.shape == (3, 80, 48)
    assert frame[:, :38].float().mean() > 250
    assert frame[:, 42:].float().mean() < 5
    assert probe_video(path)[2:4] == (48, 80)
    assert probe_video(path, as_shown=True)[2:4] == (80, 48)


@pytest.mark.parametrize("ending", ["mkv", "avi", "ts", "mov"])
def test_containers_that_state_no_count_are_counted(clip, tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16, width=80, height=48, options={"qscale": "1"})
        stream.bit_rate = 10**7
        for frame in source.decode(video=0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        container.mux(stream.encode())
    assert probe_video(path) == (24, 16.0, 48, 80, 0)
    assert shown_indices(decode_frames(path, torch.arange(24))) == list(range(24))


def test_mp4_in_fragments_is_read(clip, tmp_path):
    path = tmp_path / "fragments.mp4"
    with (
        av.open(str(clip)) as source,
        av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container,
    ):
        copy = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
    assert probe_video(path)[0] == 24


def test_a_file_that_ends_early_is_named(clip):
    with pytest.raises(ValueError, match=r"0.mp4 ends before frame 30"):
        decode_frames(clip, torch.tensor([0, 30]))


# --- videos in a data set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [bytes, lambda content: {"bytes": content, "path": "0.mp4"}])
def test_a_video_in_a_data_set_opens_like_a_file_in_another_process_as_well(clip, wrap):
    table = Dataset.from_dict({"clip": [None, wrap(clip.read_bytes())]})
    video = pickle.loads(pickle.dumps(EmbeddedVideo(table, 1, "clip")))
    assert video.open("rb").read() == clip.read_bytes()
    assert probe_video(video) == probe_video(clip)
    assert shown_indices(decode_frames(video, torch.tensor([3, 20]))) == [3, 20]
    assert str(video).startswith("row 2 of ")


def test_a_saved_data_set_is_named_by_its_file(clip, tmp_path):
    Dataset.from_dict({"clip": [clip.read_bytes()]}).save_to_disk(tmp_path / "saved")
    video = EmbeddedVideo(Dataset.load_from_disk(tmp_path / "saved"), 0, "clip")
    assert str(video).startswith(f"row 1 of {tmp_path / 'saved'}")


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": "/etc/passwd"}, b""])
def test_a_data_set_with_a_path_in_the_place_of_bytes_is_not_followed(value):
    with pytest.raises(ValueError, match="holds no bytes of the video"):
        probe_video(EmbeddedVideo([{"clip": value}], 0, "clip"))


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "leaves dataset_base_path"),
        ("../outside.mp4", "leaves"),
        ("sub/../../outside.mp4", "leaves"),
        ("link.mp4", "leaves"),
        ("folder_link/outside.mp4", "leaves"),
        ("stdin.mp4", "leaves|does not exist"),
        ("0.mp4\0.txt", "NUL character"),
        ("pipe.mp4", "a pipe, socket or device"),
        ("C:\\0.mp4", "not on a drive of Windows"),
        ("pipe:0", "not a URL or protocol"),
        ("subfile,,start,0,end,0,,:0.mp4", "not a URL or protocol"),
        ("..\\outside.mp4", "leaves"),
        (" ../outside.mp4 ", "leaves"),
        ("http://host/../../../outside.mp4", "leaves|not a URL"),
        ("%2e%2e/outside.mp4", "does not exist"),
        ("~/outside.mp4", "does not exist"),
    ],
)
def test_a_path_names_nothing_but_a_file_below_the_folder(tmp_path, path, message):
    base = tmp_path / "videos"
    (base / "sub").mkdir(parents=True)
    write_video(tmp_path / "outside.mp4", num_frames=2)
    (base / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (base / "folder_link").symlink_to(tmp_path)
    (base / "stdin.mp4").symlink_to("/dev/stdin")
    os.mkfifo(base / "pipe.mp4")
    with pytest.raises(ValueError, match=message):
        resolve_path(path, base)


def test_a_folder_that_is_itself_a_link_and_absolute_paths_below_it_are_fine(clip, tmp_path):
    (tmp_path / "real").mkdir()
    clip.rename(tmp_path / "real" / "0.mp4")
    (tmp_path / "base").symlink_to("real")
    for path in ("0.mp4", str(tmp_path / "base" / "0.mp4"), "../real/0.mp4"):
        assert resolve_path(path, tmp_path / "base") == (tmp_path / "real" / "0.mp4").resolve()


COMPOSED, DECOMPOSED = "Caf\u00e9", "Cafe\u0301"


@pytest.mark.parametrize(
    ("on_disk", "in_table"),
    [
        ("12:30.mp4", "12:30.mp4"),
        ("C:x.mp4", "C:x.mp4"),
        ("sub/a.mp4", "sub\\a.mp4"),
        ("sub/a.mp4", " .\\sub\\a.mp4 "),
        ("a.mp4", "a.mp4 "),
        (" a.mp4", " a.mp4"),
        ("a\\b.mp4", "a\\b.mp4"),
        (f"{COMPOSED}.mp4", f"{DECOMPOSED}.mp4"),
        (f"{DECOMPOSED}.mp4", f"{COMPOSED}.mp4"),
        (f"{DECOMPOSED}/{COMPOSED}.mp4", f"{COMPOSED}/{COMPOSED}.mp4"),
        (f"{COMPOSED}/{DECOMPOSED}.mp4", f"{COMPOSED}\\{COMPOSED}.mp4"),
    ],
)
def test_a_file_is_found_however_its_name_is_spelled(clip, tmp_path, on_disk, in_table):
    path = tmp_path / "videos" / on_disk
    path.parent.mkdir(parents=True)
    clip.rename(path)
    assert resolve_path(in_table, tmp_path / "videos") == path.resolve()


def test_a_name_as_it_is_written_comes_before_other_spellings(clip, tmp_path):
    for name in (f"{COMPOSED}.mp4", f"{DECOMPOSED}.mp4", "a.mp4", "a.mp4 "):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert resolve_path(name, tmp_path).name == name


# --- files that refer to others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["playlist.m3u8", "list.mp4"])
def test_a_playlist_cannot_reach_other_files_though_ffmpeg_would_let_it(clip, name):
    write_playlists(clip.parent)
    path = clip.parent / name
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 24  # without our options: the frames of 0.mp4
    with pytest.raises(ValueError, match="its format is not mp4"):
        probe_video(path)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {url}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        '<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet><Representation><BaseURL>{url}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>\n",
        "[playlist]\nFile1={url}\nNumberOfEntries=1\n",
        "WEBVTT\n\n00:00.000 --> 00:01.000\n{url}\n",
    ],
    ids=["hls", "concat", "sdp", "dash", "pls", "subtitles"],
)
def test_no_file_makes_ffmpeg_ask_a_server(tmp_path, text):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        path = tmp_path / "clip.mp4"
        path.write_text(text.format(url=f"http://127.0.0.1:{server.server_port}/secret.mp4"))
        with pytest.raises((av.FFmpegError, ValueError)):
            probe_video(path)
        server.shutdown()
        thread.join()
    assert asked == []


def test_a_mov_whose_pictures_lie_in_another_file_gets_none_of_them(tmp_path):
    """A data reference (`dref`) of the kind `alis`, which FFmpeg follows when it is asked to."""
    mov = write_with("libx264", tmp_path / "clip.mov", pixels="yuv420p").read_bytes()
    (tmp_path / "other.mov").write_bytes(mov)
    name = b"other.mov"
    record = bytes(50) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">2h", 1, 1) + bytes(16)
    record += struct.pack(">2h", 2, len(name)) + name + b"\0" + struct.pack(">2h", -1, 0)
    reference = struct.pack(">I", 12 + len(record)) + b"alis" + bytes(4) + record
    start = mov.index(b"url ", mov.index(b"dref")) - 4
    changed = bytearray(mov[:start] + reference + mov[start + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = changed.index(box) - 4
        changed[at : at + 4] = struct.pack(">I", struct.unpack(">I", changed[at : at + 4])[0] + len(reference) - 12)
    path = tmp_path / "refers.mov"
    path.write_bytes(changed)
    code = (
        "import av, sys; opened = av.open(sys.argv[1], options={'enable_drefs': '1', 'use_absolute_path': '1'}); "
        "print(sum(1 for _ in opened.decode(video=0)))"
    )
    let = subprocess.run([sys.executable, "-c", code, path.name], cwd=tmp_path, capture_output=True, text=True)
    assert let.stdout.strip() == "3"  # it would, if it were let
    with pytest.raises(ValueError, match="ends before frame 0"):
        decode_frames(path, torch.tensor([0]))


def test_whatever_ffmpeg_asks_to_open_it_does_not_get(clip, monkeypatch):
    """The second line of defence, with the first, the list of containers, taken away."""
    write_playlists(clip.parent)
    monkeypatch.setattr("causal_wan.video.opening.CONTAINERS", "hls,concat,mov,mp4")
    with pytest.raises(ValueError, match=r"refers to another file or address, .*0.mp4"):
        decode_frames(clip.parent / "playlist.m3u8", torch.tensor([0]))


# --- files that ask for too much -------------------------------------------------------------------------------------


def write_with(codec, path, *, pixels, num_frames=3, size=(48, 64), **options):
    """A grey clip."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=16, height=size[0], width=size[1])
        stream.pix_fmt = pixels
        picture = np.full((*size, 3), 90, np.uint8)
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def claim(path, marker, offset, size):
    """Overwrites bytes after every occurrence of a marker."""
    content, at = bytearray(path.read_bytes()), -1
    while (at := content.find(marker, at + 1)) >= 0:
        content[at + offset : at + offset + len(size)] = size
    path.write_bytes(content)
    return path


def refused(path, limits=DEFAULT_LIMITS, *, num_frames=1):
    """The message by which a file is refused, in probing or decoding; soon, and without taking much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((ValueError, av.FFmpegError)) as error:
        probe_video(path, limits=limits)
        decode_frames(path, torch.arange(num_frames), limits=limits)
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    return str(error.value)


@pytest.mark.parametrize("side", [16_000, 65_500])
@pytest.mark.parametrize(
    ("codec", "ending", "pixels", "marker", "offset", "form"),
    [
        ("mjpeg", "mov", "yuvj420p", b"\xff\xc0\x00\x11\x08", 5, ">2H"),
        ("png", "mov", "rgb24", b"IHDR", 4, ">2I"),
        ("gif", "gif", "rgb8", b"GIF89a", 6, "<2H"),
    ],
)
def test_pictures_that_claim_to_be_vast_are_refused(tmp_path, codec, ending, pixels, marker, offset, form, side):
    path = write_with(codec, tmp_path / f"clip.{ending}", pixels=pixels)
    claim(path, marker, offset, struct.pack(form, side, side))
    assert re.search("(is above|has more than) max_video_pixels=35389440", refused(path))


def test_frames_of_h264_that_are_larger_than_their_header_says_are_refused(tmp_path):
    path = write_with("libx264", tmp_path / "clip.mp4", pixels="yuv420p", size=(480, 640))
    claim(path, b"avc1", 28, struct.pack(">2H", 16, 16))
    claim(path, b"tkhd", 80, struct.pack(">2I", 16 << 16, 16 << 16))
    assert "max_video_pixels=100000" in refused(path, VideoLimits(max_video_pixels=100_000))


def test_headers_above_the_limits_are_refused_and_name_the_flag(tmp_path):
    path = write_with("libx264", tmp_path / "clip.mp4", pixels="yuv420p", num_frames=32)
    assert "48 x 64; scale the video down, or raise --max_video_pixels" in refused(
        path, VideoLimits(max_video_pixels=3000)
    )
    assert "--max_video_frames" in refused(path, VideoLimits(max_video_frames=31))
    assert "at most max_video_seconds=1.5, got 2" in refused(path, VideoLimits(max_video_seconds=1.5))
    exact = VideoLimits(max_video_pixels=48 * 64, max_video_frames=32, max_video_seconds=2)
    assert probe_video(path, limits=exact)[0] == 32
    assert len(decode_frames(path, torch.arange(32), limits=exact)) == 32


@pytest.mark.parametrize(("codec", "ending", "pixels"), [("gif", "gif", "rgb8"), ("mpeg4", "mkv", "yuv420p")])
def test_frames_that_no_header_counts_are_counted_up_to_the_limit_only(tmp_path, codec, ending, pixels):
    path = write_with(codec, tmp_path / f"clip.{ending}", pixels=pixels, num_frames=3000)
    assert "at most max_video_frames=100 frames" in refused(path, VideoLimits(max_video_frames=100))
    assert "max_video_seconds=60" in refused(path, VideoLimits(max_video_seconds=60))


def test_a_few_bytes_that_state_80_million_samples_are_refused(tmp_path):
    """FFmpeg alone takes 2.8 GB and 10 s to open this file of 1.5 kB."""
    path = write_with("libx264", tmp_path / "clip.mp4", pixels="yuv420p", num_frames=1)
    claim(path, b"stsz", 8, struct.pack(">2I", 1, 80_000_000))
    claim(path, b"stsc", 16, struct.pack(">I", 80_000_000))
    claim(path, b"stts", 12, struct.pack(">I", 80_000_000))
    assert "states 80000000 bytes of samples, but the file has" in refused(path)


def test_a_fragment_that_states_80_million_samples_is_refused(tmp_path):
    path = write_with(
        "libx264", tmp_path / "clip.mp4", pixels="yuv420p", num_frames=3, movflags="frag_keyframe+empty_moov"
    )
    claim(path, b"trun", 4, struct.pack(">2I", 1, 80_000_000))
    assert "states 80000000 bytes of samples" in refused(path)


def test_a_file_that_begins_with_something_else_is_not_read_as_mov(tmp_path):
    path = write_with("libx264", tmp_path / "clip.mov", pixels="yuv420p")
    path.write_bytes(struct.pack(">I", 16) + b"xxxx" + bytes(8) + path.read_bytes())
    with av.open(str(path)) as container:
        assert container.format.name.startswith("mov")
    refused(path)


def test_a_decode_that_takes_too_long_is_given_up(tmp_path):
    path = write_with("libx264", tmp_path / "clip.mp4", pixels="yuv420p", num_frames=400, size=(240, 320))
    limits = replace(DEFAULT_LIMITS, decode_timeout=0.05)
    decode = {"indices": torch.arange(400), "transform": lambda frame: (time.sleep(0.01), frame)[1]}
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"longer than decode_timeout=0.05 seconds.* --decode_timeout"):
        decode_frames(path, **decode, limits=limits)
    assert time.perf_counter() - start < 2


def test_packets_without_pictures_do_not_outrun_the_time_limit(tmp_path):
    path = write_with("mpeg4", tmp_path / "clip.mkv", pixels="yuv420p", num_frames=20_000)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="decode_timeout"):
        probe_video(path, limits=VideoLimits(decode_timeout=0.002))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", list(vars(DEFAULT_LIMITS)))
def test_limits_must_be_above_0(name):
    with pytest.raises(ValueError, match=f"{name} must be (above 0|1 or more), got 0; the default is"):
        VideoLimits(**{name: 0})


def test_an_ordinary_file_meets_the_default_limits(clip):
    with open_video(clip) as (_, stream):
        assert (stream.height, stream.width) == (48, 80)


@pytest.fixture
def garbage():
    """What the collector finds of the test's own making, kept for looking at."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def look():
        gc.collect()
        return gc.garbage

    yield look
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def test_frames_go_as_soon_as_they_are_read(tmp_path, garbage):
    """Not when garbage is collected: a frame of 4K has 12 MB."""
    path = write_video(tmp_path / "clip.mp4")
    probe_video(path, as_shown=True)
    decode_frames(path, torch.tensor([0, 5, 9]))
    assert not [found for found in garbage() if isinstance(found, av.VideoFrame)]


def test_frames_that_are_garbage_when_a_process_forks_do_not_hang_the_fork():
    frame = av.VideoFrame.from_ndarray(np.zeros((480, 832, 3), np.uint8), format="rgb24").reformat(format="yuv420p")
    frame.to_ndarray(format="rgb24")  # by a scaler with threads
    gc.disable()
    loop = [frame]
    loop.append(loop)
    del frame, loop
    fork = multiprocessing.get_context("fork").Process(target=gc.collect)
    fork.start()
    fork.join(timeout=60)
    exit_status = fork.exitcode
    fork.kill()
    gc.enable()
    assert exit_status == 0
