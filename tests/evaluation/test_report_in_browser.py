"""The reports of evaluate.py and check_dataset.py, in a real browser: they are whole, quiet and on their own."""

import pytest
from conftest import run_here


LOCAL = ("file:", "data:", "blob:")
PLAYS_H264 = "document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.64001f\"') !== ''"


@pytest.fixture(scope="module")
def evaluation(checkpoint, clips, clip_folder, tmp_path_factory):
    """A report with student, base and clips."""
    folder = tmp_path_factory.mktemp("evaluation")
    size = ["--num_frames", 17, "--height", 32, "--width", 48, "--num_frame_per_block", 1]
    data = ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos"]
    others = ["--num_base_steps", 2, "--guidance_scale", 1, "--lpips_net", None, "--clip_model", clip_folder]
    run_here("evaluate.py", "--checkpoint", checkpoint, *data, *size, *others, "--output_dir", folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def survey(clips, tmp_path_factory):
    """A report on the embedded clips."""
    folder = tmp_path_factory.mktemp("survey")
    data = ["--metadata_path", clips / "train.csv", "--dataset_base_path", clips / "videos"]
    size = ["--num_frames", 17, "--height", 32, "--width", 48]
    run_here("check_dataset.py", *data, *size, "--output_dir", folder)
    return folder / "dataset_report.html"


def boxes(page, selector):
    """Size on the screen of each element, [width, height]."""
    read = "all => all.map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height] })"
    return page.eval_on_selector_all(selector, read)


@pytest.mark.parametrize("name", ["evaluation", "survey"])
@pytest.mark.parametrize("width", [1200, 420])
def test_reports_open_without_errors_and_fetch_nothing(name, width, browser_page, request):
    report = request.getfixturevalue(name)
    browser_page.page.set_viewport_size({"width": width, "height": 900})
    browser_page.page.goto(report.as_uri(), wait_until="load")
    assert browser_page.problems == []
    assert browser_page.requests[0] == report.as_uri()
    assert [url[:80] for url in browser_page.requests if not url.startswith(LOCAL)] == []
    assert browser_page.page.inner_text("h1")
    overflow = browser_page.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0, "the page is wider than its window"


def test_pages_that_ask_for_something_or_break_are_told(browser_page, tmp_path):
    (tmp_path / "page.html").write_text(
        '<h1>x</h1><img src="http://127.0.0.1:9/a.png"><script>nothing.here()</script>'
    )
    browser_page.page.goto((tmp_path / "page.html").as_uri(), wait_until="load")
    assert "http://127.0.0.1:9/a.png" in browser_page.requests
    assert any("nothing is not defined" in problem for problem in browser_page.problems)
    assert any("a.png" in problem for problem in browser_page.problems)


def test_every_video_of_the_evaluation_plays(evaluation, browser_page):
    page = browser_page.page
    page.goto(evaluation.as_uri())
    if not page.evaluate(PLAYS_H264):
        pytest.skip("this browser cannot play H.264")
    videos = page.query_selector_all("video")
    assert len(videos) == 6  # two rows of clip, student and base
    for video in videos:
        video.evaluate("v => { v.muted = true; v.loop = true; return v.play() }")
        page.wait_for_function("v => v.readyState >= 2 && v.currentTime > 0.1", arg=video, timeout=10_000)
        assert video.evaluate("v => [v.videoWidth, v.videoHeight, v.error]") == [48, 32, None]
        assert video.evaluate("v => v.duration") == pytest.approx(17 / 16, abs=0.1)
        pause = "v => new Promise(done => { v.pause(); v.onseeked = () => done(v.currentTime); v.currentTime = 0.5 })"
        assert video.evaluate(pause) == pytest.approx(0.5, abs=0.1)


def test_videos_begin_to_play_by_themselves_once_they_are_seen(evaluation, browser_page):
    page = browser_page.page
    page.goto(evaluation.as_uri())
    if not page.evaluate(PLAYS_H264):
        pytest.skip("this browser cannot play H.264")
    last = page.query_selector_all("video")[-1]
    last.scroll_into_view_if_needed()
    page.wait_for_function("v => !v.paused && v.currentTime > 0", arg=last, timeout=10_000)
    assert last.evaluate("v => v.muted && v.loop && v.controls")


def test_curves_tables_and_prompts_of_the_evaluation_are_to_be_seen(evaluation, browser_page):
    page = browser_page.page
    page.goto(evaluation.as_uri())
    text = page.inner_text("main")
    for shown in (
        "PSNR [dB]",
        "CLIP score",
        "blur gap",
        "757",
        "a ball, number 6, crosses the field",
        "student",
        "base",
    ):
        assert shown in text
    curves = boxes(page, ".charts svg[role=img] polyline")
    assert len(curves) == 4  # of PSNR and sharpness, of student and base
    assert all(width > 100 for width, _ in curves)
    strokes = "all => all.map(e => getComputedStyle(e).stroke)"
    colours = page.eval_on_selector_all(".charts svg[role=img] polyline", strokes)
    assert len(set(colours)) == 2
    assert "none" not in colours
    cells = page.eval_on_selector_all("td.n", "all => all.map(e => e.textContent)")
    assert sum(cell.replace(".", "").replace("-", "").isdigit() for cell in cells) > 15
    assert "nan" not in " ".join(cells)


def test_pictures_and_charts_of_the_survey_are_to_be_seen(survey, browser_page):
    page = browser_page.page
    page.goto(survey.as_uri())
    sizes = page.eval_on_selector_all("img", "all => all.map(e => [e.complete, e.naturalWidth, e.naturalHeight])")
    assert len(sizes) >= 6
    assert all(complete and width > 0 and height > 0 for complete, width, height in sizes)
    bars = boxes(page, "svg rect, .bar")
    assert len(bars) > 0
    assert any(width > 5 and height > 5 for width, height in bars)
