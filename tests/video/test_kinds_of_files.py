"""Files with several streams, pictures in the place of videos, HDR and interlaced clips."""

import io
import struct
import zlib

import av
import numpy as np
import PIL.Image
import pytest
import torch
from grey_videos import write_video

from causal_wan.data.clips import load_video
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.facts import Traits
from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import DISPOSITION, open_video


def config(folder, *names, **changes):
    (folder / "rows.csv").write_text("video,prompt\n" + "".join(f"{name},a\n" for name in names))
    paths = {"dataset_base_path": str(folder), "metadata_path": str(folder / "rows.csv")}
    return DataConfig(**paths, **{"num_frames": 1, "height": 48, "width": 48, **changes})


# --- streams ---------------------------------------------------------------------------------------------------------


def write_streams(path, *streams, num_frames=3):
    """A file with video streams of (height, width, disposition), each of one grey, its number times 50."""
    with av.open(str(path), "w") as container:
        added = []
        for height, width, disposition in streams:
            stream = container.add_stream("libx264", rate=16, height=height, width=width)
            stream.pix_fmt, stream.disposition = "yuv420p", disposition
            added.append(stream)
        for _ in range(num_frames):
            for number, stream in enumerate(added):
                picture = np.full((stream.height, stream.width, 3), 50 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in added:
            container.mux(stream.encode())
    return path


DEFAULT, NONE = DISPOSITION.default, DISPOSITION(0)


@pytest.mark.parametrize(
    ("ending", "streams", "best"),
    [
        ("mkv", [(32, 48, NONE), (48, 80, DEFAULT)], 1),
        ("mkv", [(48, 80, DEFAULT), (64, 96, NONE)], 0),
        ("mp4", [(32, 48, DEFAULT), (48, 80, DEFAULT), (32, 32, DEFAULT)], 1),
        ("mp4", [(48, 80, DEFAULT), (48, 80, DEFAULT)], 0),
        ("ts", [(32, 48, NONE), (48, 80, NONE)], 1),
    ],
)
def test_of_several_streams_the_best_is_read(tmp_path, ending, streams, best):
    path = write_streams(tmp_path / f"clip.{ending}", *streams)
    facts = probe_video(path)
    assert facts[2:4] == streams[best][:2]
    assert facts.traits == (Traits.OTHER_STREAM if best else 0)
    frames = decode_frames(path, torch.arange(3))
    assert frames.shape[2:] == streams[best][:2]
    assert frames.float().mean() == pytest.approx(50 * best, abs=3)


def write_with_cover(path, *, sound=False):
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1, height=96, width=96)
        cover.pix_fmt, cover.disposition = "rgb24", DISPOSITION.attached_pic
        other = container.add_stream("aac", rate=16000) if sound else container.add_stream("libx264", rate=16)
        if not sound:
            other.height, other.width, other.pix_fmt = 48, 80, "yuv420p"
        art = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 200, np.uint8), format="rgb24")
        container.mux(cover.encode(art))
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((48, 80, 3), 50, np.uint8), format="rgb24")
            if sound:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate = 16000
            container.mux(other.encode(frame))
        container.mux(other.encode())
    return path


def test_cover_art_is_no_clip(tmp_path):
    path = write_with_cover(tmp_path / "clip.mp4")
    assert probe_video(path)[:4] == (3, 16.0, 48, 80)
    assert decode_frames(path, torch.tensor([0])).float().mean() == pytest.approx(50, abs=3)
    with pytest.raises(ValueError, match="no video stream, only cover art"):
        probe_video(write_with_cover(tmp_path / "song.mp4", sound=True))


# --- animated pictures -----------------------------------------------------------------------------------------------


def write_avif(path, num_frames, brand=b"avis"):
    """AVIF of greys; FFmpeg adds a still of the first to several, as a stream of its own."""
    with av.open(str(path), "w", format="avif") as container:
        stream = container.add_stream("libsvtav1", rate=16, height=64, width=96, options={"svtav1-params": "lp=1"})
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = np.full((64, 96, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"ftypavis", b"ftyp" + brand))
    return path


@pytest.mark.parametrize("brand", [b"avis", b"msf1"])
def test_of_an_animated_picture_the_frames_are_read_and_not_its_still(tmp_path, brand):
    path = write_avif(tmp_path / "a.avif", 8, brand)
    facts = probe_video(path)
    assert facts[:4] == (8, pytest.approx(16, rel=0.02), 64, 96)
    greys = decode_frames(path, torch.arange(8)).float().mean(dim=(1, 2, 3))
    assert greys == pytest.approx(20 * np.arange(8), abs=4)
    assert probe_video(write_avif(tmp_path / "b.avif", 1)).num_frames == 1


def jpeg(seed, size=(48, 80), **options):
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_in_a_row_are_a_video(tmp_path, progressive):
    path = tmp_path / "a.mjpeg"
    pictures = [jpeg(seed, progressive=progressive) for seed in range(5)]
    path.write_bytes(b"".join(pictures))
    facts = probe_video(path)
    assert facts[:4] == (5, 25, 48, 80)
    assert not facts.traits & Traits.PICTURE
    (tmp_path / "b.jpg").write_bytes(pictures[3])
    alone = decode_frames(tmp_path / "b.jpg", torch.tensor([0]))
    decoded = decode_frames(path, torch.arange(5))
    assert (decoded[3].float() - alone.float()).abs().mean() < 20  # colours are smoothed by another rule
    assert (decoded[2].float() - alone.float()).abs().mean() > 50


def test_a_jpeg_with_pictures_behind_it_is_one_picture(tmp_path):
    """Cameras append previews, and the parts of a depth or bright picture, which the first announces."""
    path = tmp_path / "a.jpg"
    big = jpeg(0, (1000, 1000), quality=100)
    assert len(big) > 1 << 20
    behind = {
        "preview": jpeg(1, (24, 40)),
        "film": b"\0\0\0\x14ftypmp42" + bytes(40),
        "nothing": b"",
        "zeros": bytes(9),
    }
    for content in behind.values():
        for first, size in ((jpeg(0), (48, 80)), (big, (1000, 1000))):
            path.write_bytes(first + content)
            assert probe_video(path) == (1, 16.0, *size, Traits.PICTURE)
    PIL.Image.open(io.BytesIO(jpeg(0))).save(
        path, format="MPO", save_all=True, append_images=[PIL.Image.open(io.BytesIO(jpeg(1)))]
    )
    assert probe_video(path).traits == Traits.PICTURE


# --- what can be seen through ----------------------------------------------------------------------------------------


def see_through():
    """Red, of which the left half is invisible and a quarter half so."""
    pixels = np.full((48, 80, 4), (255, 0, 0, 255), np.uint8)
    pixels[:, :40, 3] = 0
    pixels[:, 40:60, 3] = 128
    return pixels


@pytest.mark.parametrize("ending", ["png", "webp", "mov", "mkv"])
def test_what_can_be_seen_through_lies_on_white(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending in ("png", "webp"):
        PIL.Image.fromarray(see_through()).save(path, lossless=True)
    else:
        with av.open(str(path), "w") as container:
            codec, pixels = ("qtrle", "argb") if ending == "mov" else ("ffv1", "bgra")
            stream = container.add_stream(codec, rate=16, height=48, width=80)
            stream.pix_fmt = pixels
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(see_through(), format="rgba")))
            container.mux(stream.encode())
    (frame,) = decode_frames(path, torch.tensor([0]))
    assert [frame[:, 24, x].tolist() for x in (10, 50, 70)] == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]


@pytest.mark.parametrize("num_frames", [1, 4])
def test_an_avif_that_can_be_seen_through_lies_on_white(tmp_path, num_frames):
    """FFmpeg gives the opacity as a stream of its own. The picture wanders to the left, and so must its opacity."""
    pictures = [PIL.Image.fromarray(np.roll(see_through(), -10 * index, 1)) for index in range(num_frames)]
    more = {"save_all": True, "append_images": pictures[1:], "duration": 80} if num_frames > 1 else {}
    pictures[0].save(tmp_path / "a.avif", quality=100, **more)
    assert probe_video(tmp_path / "a.avif", as_shown=True)[2:4] == (48, 80)
    frames = decode_frames(tmp_path / "a.avif", torch.arange(num_frames))
    for index, frame in enumerate(frames):
        colours = torch.roll(frame, 10 * index, 2)[:, 24, [10, 50, 70]].T.flatten().tolist()
        assert colours == pytest.approx([255, 255, 255, 255, 127, 127, 255, 0, 0], abs=8)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_palettes_with_an_invisible_colour_lie_on_white(tmp_path, ending):
    picture = PIL.Image.new("P", (80, 48), 0)
    picture.putpalette([0, 0, 255, 0, 255, 0])
    picture.paste(1, (40, 0, 80, 48))
    picture.save(tmp_path / f"a.{ending}", transparency=0)
    (frame,) = decode_frames(tmp_path / f"a.{ending}", torch.tensor([0]))
    assert [frame[:, 24, x].tolist() for x in (10, 70)] == [[255, 255, 255], [0, 255, 0]]


# --- pictures --------------------------------------------------------------------------------------------------------


def write_picture(path, orientation=1, **options):
    """White on the left, black on the right, 48 x 80."""
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:, :40] = 255
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    PIL.Image.fromarray(picture).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, ending):
    write_picture(tmp_path / f"a.{ending}")
    settings = config(tmp_path, f"a.{ending}")
    (row,) = load_rows(settings)
    assert (row.num_frames, row.height, row.width) == (1, 48, 80)
    clip, num_valid = load_video(row, settings.shape, settings, torch.Generator())
    assert (clip.shape, num_valid) == ((3, 1, 48, 48), 1)
    assert clip[..., :20].float().mean() > 250
    assert clip[..., 28:].float().mean() < 5


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize(("orientation", "white"), [(2, "right"), (3, "right"), (5, "top"), (6, "top"), (8, "bottom")])
def test_pictures_are_turned_as_their_exif_says(tmp_path, ending, orientation, white):
    (frame,) = decode_frames(write_picture(tmp_path / f"a.{ending}", orientation), torch.tensor([0]))
    assert frame.shape[1:] == ((48, 80) if white == "right" else (80, 48))
    part = {"right": frame[..., 50:], "top": frame[:, :30], "bottom": frame[:, 50:]}[white]
    assert part.float().mean() > 250


def test_pictures_of_16_bits_are_as_bright_as_others(tmp_path):
    PIL.Image.fromarray(np.full((48, 80), 30_000, np.uint16)).save(tmp_path / "a.png")
    assert decode_frames(tmp_path / "a.png", torch.tensor([0])).unique().tolist() == [117]


def test_a_picture_among_videos_is_named_left_out_or_padded(tmp_path):
    write_video(tmp_path / "0.mp4")
    write_picture(tmp_path / "a.png")
    names = ("0.mp4", "a.png")
    with pytest.raises(ValueError, match=r"row 2, a.png: a picture and not a video that can be read as num_frames=9"):
        load_rows(config(tmp_path, *names, num_frames=9))
    assert len(load_rows(config(tmp_path, *names, num_frames=9, short_clips="skip"))) == 1
    settings = config(tmp_path, *names, num_frames=9, short_clips="pad")
    clip, num_valid = load_video(load_rows(settings)[1], settings.shape, settings, torch.Generator())
    assert (clip.shape[1], num_valid) == (9, 1)
    assert len(load_rows(config(tmp_path, *names, num_frames=9, frame_buckets=(1, 9)))) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.bmp", "a BMP picture and not a video that can be read; pictures may be PNG, JPEG, WebP"),
        ("a.tiff", "a TIFF picture and not"),
        ("a.jp2", "a JPEG 2000 picture and not"),
        ("moves.webp", "a WebP picture that moves and not a video"),
        ("moves.png", "a PNG picture that moves and not a video"),
        ("cut.png", "a PNG picture that cannot be read"),
        ("cut.jpg", "a JPEG picture that cannot be read"),
    ],
)
def test_other_pictures_are_named_for_what_they_are(tmp_path, name, said):
    path = tmp_path / name
    still = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8))
    more = {"save_all": True, "append_images": [still.rotate(90)]} if "moves" in name else {}
    still.save(path, **more)
    if "cut" in name:
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=said):
        probe_video(path)
        decode_frames(path, torch.tensor([0]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
            "a pointer of Git LFS and not the video",
        ),
        (b"/annex/objects/MD5E-s5--abc.mp4\n", "a pointer of git-annex and not the video"),
        (b"\n<!DOCTYPE html><title>Not found</title>", "a web page and not a video; download the video again"),
        (b"<html>404 not found</html>", "a web page and not a video"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page and not a video"),
        (b"PK\3\4" + bytes(60), "an archive and not a video; unpack it"),
        (b"\x1f\x8b\x08" + bytes(60), "an archive and not a video; unpack it"),
        (b"YUV4MPEG2 W16 H16 F16:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(384), "its format is not mp4, mov, mkv, webm"),
        (b"just some text\n" * 20, "its format is not mp4, mov, mkv, webm"),
    ],
)
def test_what_is_no_video_is_named_for_what_it_is(tmp_path, content, said):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        probe_video(path)


def test_what_fails_after_a_file_is_open_is_not_taken_for_its_format(tmp_path):
    path = write_streams(tmp_path / "a.mp4", (32, 48, DEFAULT))
    with pytest.raises(av.error.ArgumentError), open_video(path):
        raise av.error.ArgumentError(22, "of a decoder")


def test_a_picture_that_claims_to_be_vast_is_refused_before_it_is_read(tmp_path):
    path = write_picture(tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">2I", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    for limits in (VideoLimits(), VideoLimits(max_video_pixels=10**11)):
        with pytest.raises(ValueError, match=r"max_video_pixels=35389440|cannot be read \(Image size"):
            probe_video(path, limits=limits)
    write_picture(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="got 48 x 80"):
        decode_frames(tmp_path / "b.jpg", torch.tensor([0]), limits=VideoLimits(max_video_pixels=3000))


# --- light and fields ------------------------------------------------------------------------------------------------


def write_tagged(path, *, transfer=None, interlaced=False):
    with av.open(str(path), "w") as container:
        options = {"x264-params": "interlaced=1:tff=1"} if interlaced else {}
        stream = container.add_stream("libx264", rate=16, height=64, width=96, options=options)
        stream.pix_fmt = "yuv420p"
        if transfer is not None:
            stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9
            stream.codec_context.colorspace = 9
        for _ in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 90, np.uint8), format="rgb24").reformat(
                format="yuv420p"
            )
            if transfer is not None:
                frame.color_trc, frame.color_primaries, frame.colorspace = transfer, 9, 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_hdr_and_interlaced_clips_are_counted_once(tmp_path, caplog):
    write_tagged(tmp_path / "pq.mp4", transfer=16)
    write_tagged(tmp_path / "hlg.mp4", transfer=18)
    write_tagged(tmp_path / "fields.mp4", interlaced=True)
    write_tagged(tmp_path / "plain.mp4")
    rows = load_rows(config(tmp_path, "pq.mp4", "hlg.mp4", "fields.mp4", "plain.mp4"))
    hdr = Traits.HIGH_DYNAMIC_RANGE
    assert [row.traits for row in rows] == [hdr, hdr, Traits.INTERLACED, 0]
    assert [record.getMessage()[:20] for record in caplog.records] == ["2 clip(s) are HDR (P", "1 clip(s) are interl"]
