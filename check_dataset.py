"""Reads every clip of a data set before anything is trained on it, and writes a report to look at.

    python check_dataset.py --dataset_base_path data/videos --metadata_path data/metadata.csv

Takes a recipe of the training script as well (`--config`), and its flags for data. In the output folder:

    dataset_report.html  usable and bad rows, histograms, duplicates, black and static clips, a contact sheet, advice
    contact_sheet.png    random rows as the model will see them
    bad_rows.csv         rows that cannot be used, with the reason
    records.jsonl        what was found in each file: run the same command again after an interruption, or after
                         correcting files, and only what is new or has changed is read

Exit status: 0 if all rows can be used, 1 if some are bad, 2 if the settings or the table cannot be used.
"""

import csv
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from causal_wan.config.choices import LocalPath
from causal_wan.config.fields import flat_dict
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import NonNegativeInt, PositiveInt, Seed, checked_dataclass
from causal_wan.config.refusals import describe_refusal
from causal_wan.config.settings import BaseModelConfig
from causal_wan.data.settings import DataConfig
from causal_wan.runs.settings import TRAINING_SETTINGS


@checked_dataclass
class Config:
    """What to check, and where the report goes."""

    data: DataConfig
    output_dir: LocalPath = "outputs/check"
    """Folder of the report."""
    num_processes: NonNegativeInt | None = None
    """Processes that decode; None is one a core, 0 is this one alone."""
    num_samples: NonNegativeInt = 12
    """Random rows on the contact sheet."""
    seed: Seed = 0
    """Chooses them."""
    pretrained_model_name_or_path: LocalPath | None = None
    """Checkpoint whose tokenizer counts the tokens of prompts; without, words are counted."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    max_sequence_length: PositiveInt = 512
    """Tokens that prompts are cut at."""


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__, also_known=TRAINING_SETTINGS)

import av
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from causal_wan.data.buckets import clip_shapes
from causal_wan.data.clips import load_video
from causal_wan.data.descriptions import count_schedules
from causal_wan.data.frames import min_num_frames, num_sampleable_frames
from causal_wan.data.rows import Row, describe_short_picture, find_video, read_tables
from causal_wan.runs.parts import fit_to_checkpoint
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.survey.report import MAX_BAD_ROWS_SHOWN, Entry, film_strip, render, shorten, write_contact_sheet
from causal_wan.survey.row_checks import (
    FACTS,
    NUM_LOOKS,
    WHOLE_FILE_BYTES,
    RecordFile,
    RowChecker,
    check_rows,
    hash_bytes,
)
from causal_wan.survey.survey import BLACK_LUMA, STATIC_MOTION, Survey, count_reason
from causal_wan.tables.prompt_schedules import texts_of
from causal_wan.tables.table import Tables
from causal_wan.video.facts import Traits
from causal_wan.video.opening import describe_error


NUM_STRIP_FRAMES = 6
PROMPTS_AT_ONCE = 1000


@user_errors(OSError)
def main(config: Config) -> int:
    """Checks all rows and writes the report; returns the exit status."""
    with user_errors():
        check_output_folder("output_dir", config.output_dir)
        if config.pretrained_model_name_or_path is not None:
            model = BaseModelConfig(
                pretrained_model_name_or_path=config.pretrained_model_name_or_path, revision=config.revision
            )
            config = replace(config, data=fit_to_checkpoint(config.data, model))
        table = Tables(read_tables(config.data))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    records = RecordFile(folder / "records.jsonl")
    facts = collect_facts(table, records, config)
    hashes, lengths, unit = measure_prompts(table, config)
    is_short, num_scheduled = find_short(facts, config.data), count_schedules(table)
    survey = Survey(
        config.data, facts, is_short, hashes, lengths, unit, config.max_sequence_length, num_scheduled=num_scheduled
    )
    bad_entries = write_bad_rows(table, survey, records, folder / "bad_rows.csv")
    sheet = contact_sheet(table, survey, config)
    write_contact_sheet(sheet, folder / "contact_sheet.png")
    page = render(
        survey,
        show=lambda index: entry(table, index),
        bad_entries=bad_entries,
        contact_sheet=sheet,
        black=strips(table, survey, np.flatnonzero(survey.black)[:6], config),
        static=strips(table, survey, np.flatnonzero(survey.static)[:6], config),
        settings=flat_dict(config.data),
        notes=describe_figures(config, unit),
    )
    report = folder / "dataset_report.html"
    report.write_text(page, encoding="utf-8", errors="replace")
    num_bad = int(survey.bad.sum())
    if num_scheduled:
        print(f"prompts change along the clips of {num_scheduled} rows (prompt_schedule)")
    print(f"{int(survey.usable.sum())} of {len(table)} rows can be used, {num_bad} are bad; see {report}")
    return 1 if num_bad or not survey.usable.any() else 0


# --- facts -----------------------------------------------------------------------------------------------------------


def collect_facts(table: Tables, records: RecordFile, config: Config) -> np.ndarray:
    """`FACTS` of every row: from the records that are there, and for the others from the files."""
    facts = np.zeros(len(table), FACTS)
    num_processes = len(os.sched_getaffinity(0)) if config.num_processes is None else config.num_processes
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.npy"
        records.save_keys(keys)
        checker = RowChecker(config.data, str(keys))
        progress = tqdm(total=len(table), desc="rows", unit="row", dynamic_ncols=True)
        for chunk in check_rows(enumerate(table, 1), checker, num_processes):
            for record in chunk:
                is_new = len(record) > 2
                facts[record["row"] - 1] = records.add(record) if is_new else records.find(record["key"])
            records.flush()
            progress.update(len(chunk))
        progress.close()
    return facts


def find_short(facts: np.ndarray, config: DataConfig) -> np.ndarray:
    """Rows that have fewer frames than a run needs, bool."""
    wanted = min_num_frames(config)
    is_short = np.zeros(len(facts), bool)
    for index in np.flatnonzero(~facts["is_bad"]):
        frames, rate = int(facts["frames"][index]), float(facts["rate"][index])
        is_short[index] = num_sampleable_frames(frames, rate, config) < wanted
    return is_short


# --- prompts ---------------------------------------------------------------------------------------------------------


def measure_prompts(table: Tables, config: Config) -> tuple[np.ndarray, np.ndarray, str]:
    """Hashes of each row's prompts, the length of the longest of them, and the unit of the lengths."""
    tokenizer = load_tokenizer(config)
    hashes, lengths = np.zeros(len(table), np.uint64), np.zeros(len(table), np.int64)
    for start in range(0, len(table), PROMPTS_AT_ONCE):
        end = min(start + PROMPTS_AT_ONCE, len(table))
        rows = [texts_of(table[index].prompts) for index in range(start, end)]
        counts = iter(count_tokens([prompt for prompts in rows for prompt in prompts], tokenizer))
        for index, prompts in enumerate(rows, start):
            if prompts:
                text = "\0".join(" ".join(prompt.split()) for prompt in prompts)
                hashes[index] = hash_bytes(text.encode(errors="replace"))
                lengths[index] = max(next(counts) for _ in prompts)
    return hashes, lengths, "tokens" if tokenizer else "words"


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint, if one is named and can be had; says so if it cannot."""
    if config.pretrained_model_name_or_path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            config.pretrained_model_name_or_path, subfolder="tokenizer", revision=config.revision
        )
    except (OSError, ValueError) as error:
        reason = describe_refusal(error)
        print(f"words are counted, not tokens: the tokenizer cannot be loaded ({reason})", file=sys.stderr)
        return None


def count_tokens(prompts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of each prompt, or words."""
    if tokenizer is None or not prompts:
        return [len(prompt.split()) for prompt in prompts]
    return [len(tokens) for tokens in tokenizer(prompts, verbose=False).input_ids]


# --- rows to show ----------------------------------------------------------------------------------------------------


def entry(table: Tables, index: int, **more: Any) -> Entry:
    """A row as it is shown."""
    row = table[index]
    name = f"{table.name(index)}: " if len(table.tables) > 1 else ""
    return Entry(row.number, f"{name}{row.video or ''}", shorten(" | ".join(map(str, row.prompts))), **more)


def write_bad_rows(table: Tables, survey: Survey, records: RecordFile, path: Path) -> list[Entry]:
    """Lists all bad rows in a CSV, counts their reasons, and returns the first of them."""
    first = []
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "video", "reason"])
        for index in np.flatnonzero(survey.bad):
            facts = survey.facts[index]
            if facts["is_bad"]:
                reason = records.read(facts)["error"]
            else:
                wanted = min_num_frames(survey.config)
                available = num_sampleable_frames(int(facts["frames"]), float(facts["rate"]), survey.config)
                reason = f"{available} frames, fewer than num_frames={wanted}"
                if int(facts["traits"]) & Traits.PICTURE:
                    reason = describe_short_picture(wanted)
            bad = entry(table, int(index), note=reason)
            writer.writerow([bad.number, bad.path, reason])
            count_reason(survey.reasons, reason)
            if len(first) < MAX_BAD_ROWS_SHOWN:
                first.append(bad)
    return first


def contact_sheet(table: Tables, survey: Survey, config: Config) -> list[Entry]:
    """Random usable rows, with strips."""
    usable = np.flatnonzero(survey.usable)
    chosen = random.Random(config.seed).sample(range(len(usable)), min(config.num_samples, len(usable)))
    return strips(table, survey, usable[sorted(chosen)], config)


def strips(table: Tables, survey: Survey, indices: np.ndarray, config: Config) -> list[Entry]:
    """Rows with a few of their frames, as the model sees them."""
    entries = []
    for index in map(int, indices):
        facts, table_row = survey.facts[index], table[index]
        try:
            video, _ = find_video(table_row)
            shown = {name: facts[name].item() for name in ("height", "width")}
            shown["traits"] = Traits(int(facts["traits"]))
            row = Row(table_row.number, video, table_row.prompts, int(facts["frames"]), float(facts["rate"]), **shown)
            shape = clip_shapes(row, config.data)[-1]
            clip, _ = load_video(row, shape, config.data, seeded_generator(config.seed, RandomPurpose.CLIP, index))
        except (ValueError, OSError, av.FFmpegError) as error:  # it was removed or changed meanwhile
            entries.append(entry(table, index, note=describe_error(error)))
            continue
        places = torch.linspace(0, clip.shape[1] - 1, NUM_STRIP_FRAMES).round().long()
        frames = clip[:, places].permute(1, 2, 3, 0).numpy()
        note = f"{row.num_frames} frames of {row.height} × {row.width} → {shape[0]} of {shape[1]} × {shape[2]}"
        entries.append(entry(table, index, note=note, strip=film_strip(frames)))
    return entries


def describe_figures(config: Config, unit: str) -> list[str]:
    """How the figures of the report were made."""
    megabytes = WHOLE_FILE_BYTES >> 20
    return [
        f"Every clip was decoded to its end. Brightness and motion are of {NUM_LOOKS} frames, evenly spread, shrunk "
        "to 32 × 32 pixels.",
        f"Black: mean brightness below {BLACK_LUMA:g} of 255. Nearly static: from one of these frames to the next, "
        f"no place changes by more than {STATIC_MOTION:g} of 255, in the mean over time.",
        f"Duplicate files have the same bytes; above {megabytes} MiB, the same size and the same first and last "
        f"{megabytes // 4} MiB. Clips that were encoded anew are not found. Duplicate prompts differ in "
        "white space at most.",
        f"Prompts are measured in {unit}; of several prompts of a row, the longest counts.",
    ]


if __name__ == "__main__":
    sys.exit(main(config))
