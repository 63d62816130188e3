"""A survey of a data set as one HTML page that fetches nothing, and its contact sheet as a PNG.

Paths and prompts may come from anyone: all text is escaped, and the page forbids itself scripts and requests.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont

from causal_wan.survey.survey import MAX_REASONS, Survey, histograms, suggest, summary


MAX_BAD_ROWS_SHOWN = 200
MAX_GROUPS_SHOWN = 20
MAX_ROWS_IN_GROUP = 8
MAX_PROMPT_CHARACTERS = 300
STRIP_HEIGHT = 112  # pixels
LABEL_HEIGHT = 22


@dataclass(frozen=True)
class Entry:
    """A row as it is shown."""

    number: int
    path: str
    prompt: str
    note: str = ""  # what is wrong with it, or is to be known of it
    strip: Image.Image | None = None  # a few of its frames, side by side

    @property
    def image(self) -> str:
        """The strip as a data URI."""
        buffer = io.BytesIO()
        self.strip.save(buffer, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def film_strip(frames: np.ndarray) -> Image.Image:
    """Frames, uint8 `(T, height, width, 3)`, side by side, all of one height."""
    pictures = [Image.fromarray(frame) for frame in frames]
    width = max(1, round(STRIP_HEIGHT * pictures[0].width / pictures[0].height))
    strip = Image.new("RGB", ((width + 2) * len(pictures) - 2, STRIP_HEIGHT), "white")
    for place, picture in enumerate(pictures):
        strip.paste(picture.resize((width, STRIP_HEIGHT), Image.Resampling.LANCZOS), (place * (width + 2), 0))
    return strip


def write_contact_sheet(entries: Sequence[Entry], path: Path) -> None:
    """Strips below each other, each under its row number and prompt; nothing if there are none."""
    entries = [entry for entry in entries if entry.strip is not None]
    if not entries:
        return
    width, font = max(max(entry.strip.width for entry in entries), 480), ImageFont.load_default(size=13)
    row_height = STRIP_HEIGHT + LABEL_HEIGHT + 8
    sheet = Image.new("RGB", (width + 16, row_height * len(entries) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for place, entry in enumerate(entries):
        label, top = f"row {entry.number}  {' '.join(entry.prompt.split())}", 8 + place * row_height
        while pen.textlength(label, font) > width and len(label) > 1:
            label = label[:-2].rstrip("…") + "…"
        pen.text((8, top), label, "#333", font)
        sheet.paste(entry.strip, (8, top + LABEL_HEIGHT))
    sheet.save(path)


def shorten(text: str) -> str:
    """The beginning of a long prompt."""
    return text if len(text) <= MAX_PROMPT_CHARACTERS else text[:MAX_PROMPT_CHARACTERS] + "…"


def mark_flags(text: str) -> Markup:
    """Escaped text with its flags set as code."""
    return Markup(re.sub(r"--[a-z_]+", r'<code class="flag">\g<0></code>', str(escape(text))))


def first_groups(groups: Sequence[np.ndarray], show: Callable[[int], Entry]) -> list[dict[str, Any]]:
    """The largest groups of rows, and the first rows of each."""
    return [
        {"count": len(group), "entries": [show(int(index)) for index in group[:MAX_ROWS_IN_GROUP]]}
        for group in groups[:MAX_GROUPS_SHOWN]
    ]


def render(
    survey: Survey,
    *,
    show: Callable[[int], Entry],
    bad_entries: Sequence[Entry],
    contact_sheet: Sequence[Entry],
    black: Sequence[Entry],
    static: Sequence[Entry],
    settings: dict[str, Any],
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
        survey: Of all rows.
        show: Row index -> the row, as it is shown in lists.
        bad_entries: The first bad rows, with their reasons.
        contact_sheet: Random rows as the model sees them.
        black, static: Some of the clips that are, with strips.
        settings: What the rows were checked for.
        notes: How the figures were made.
    """
    files, prompts = survey.duplicate_files(), survey.duplicate_prompts()
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["flags"] = mark_flags
    return environment.get_template("report.html.jinja").render(
        **summary(survey),
        suggestions=suggest(survey),
        reasons=survey.reasons.most_common(MAX_REASONS + 1),
        bad_entries=bad_entries,
        kinds=survey.kinds,
        charts=histograms(survey),
        duplicate_files={"groups": first_groups(files, show), "count": len(files)},
        duplicate_prompts={"groups": first_groups(prompts, show), "count": len(prompts)},
        num_cut=int(survey.is_cut.sum()),
        black={"count": int(survey.black.sum()), "entries": black},
        static={"count": int(survey.static.sum()), "entries": static},
        contact_sheet=contact_sheet,
        settings=settings,
        notes=notes,
    )
