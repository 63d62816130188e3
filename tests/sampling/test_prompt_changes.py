"""Prompts that change along a video, of a pipeline whose encoder is known, against loops over blocks and frames."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from causal_wan.blocks import CausalConfig
from causal_wan.geometry import LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.sampling import prompt_changes
from causal_wan.sampling.prompt_changes import (
    as_next_conditions,
    as_schedules,
    check_has_blocks,
    embed_frame_prompts,
    embed_schedules,
)
from causal_wan.tables.prompt_schedules import PromptSchedule


LENGTH = 6  # tokens that prompts are padded to
GEOMETRY = LatentGeometry(temporal_factor=8, frame_rate=10)


def embed_of(text):
    """The known encoder: as many tokens as words, all of one number."""
    return torch.full((len(text.split()), 2), float(sum(text.encode())))


def padded(text):
    embeds = torch.zeros(LENGTH, 2)
    embeds[: len(text.split())] = embed_of(text)
    return embeds


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded, and those that are looked at for their lengths."""
    noted = SimpleNamespace(texts=[], measured=[])

    def encode(tokenizer, text_encoder, texts, max_sequence_length):
        assert (tokenizer, text_encoder, max_sequence_length) == ("tokenizer", "encoder", LENGTH)
        noted.texts += texts
        return [embed_of(text) for text in texts]

    def measure(tokenizer, texts, max_sequence_length):
        assert (tokenizer, max_sequence_length) == ("tokenizer", LENGTH)
        noted.measured += texts

    monkeypatch.setattr(prompt_changes, "encode_prompts", encode)
    monkeypatch.setattr(prompt_changes, "warn_of_cut_prompts", measure)
    return noted


def make_pipeline(**causal):
    config = CausalConfig(**{"num_frame_per_block": 2, **causal})
    transformer = SimpleNamespace(causal_config=config, block_lengths=config.block_lengths, dtype=torch.float64)
    return SimpleNamespace(
        geometry=GEOMETRY,
        transformer=transformer,
        tokenizer="tokenizer",
        text_encoder="encoder",
        _execution_device=torch.device("cpu"),
    )


def schedule(*pairs):
    return PromptSchedule.of(pairs)


# --- schedules of a call ---------------------------------------------------------------------------------------------


AFTER = [(0.5, "b"), (1, "c")]
WHOLE = schedule((0, "b"), (1, "c"))


@pytest.mark.parametrize(
    ("prompt", "changes", "expected"),
    [
        ("a", AFTER, [schedule((0, "a"), *AFTER)]),
        ("a", tuple(map(list, AFTER)), [schedule((0, "a"), *AFTER)]),
        ("a", [AFTER], [schedule((0, "a"), *AFTER)]),
        (["a"], AFTER, [schedule((0, "a"), *AFTER)]),
        (["a", "d"], AFTER, [schedule((0, "a"), *AFTER), schedule((0, "d"), *AFTER)]),
        (["a", "d"], [AFTER, [(2, "e")]], [schedule((0, "a"), *AFTER), schedule((0, "d"), (2, "e"))]),
        (["a", "d"], [AFTER, AFTER], [schedule((0, "a"), *AFTER), schedule((0, "d"), *AFTER)]),
        (None, [(0, "a"), (2, "e")], [schedule((0, "a"), (2, "e"))]),
        (None, WHOLE, [WHOLE]),
        (None, [WHOLE, [(0, "a"), (2, "e")]], [WHOLE, schedule((0, "a"), (2, "e"))]),
        (None, [[(0, "a"), (2, "e")], WHOLE], [schedule((0, "a"), (2, "e")), WHOLE]),
    ],
)
def test_a_schedule_is_one_for_all_videos_or_one_for_each_and_goes_on_from_the_prompt(prompt, changes, expected):
    assert as_schedules(prompt, changes) == expected


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("a", "b", r"^prompt_schedule must be pairs of seconds and a prompt such as \[\(2.5, .*\], got 'b'\.$"),
        ("a", 2.5, r"^prompt_schedule must be pairs .* got 2\.5\.$"),
        (["a", "b", "c"], [AFTER, AFTER], "one prompt_schedule, or one for each of 3 prompts, got 2"),
        ("a", [AFTER, AFTER], "one prompt_schedule, or one for each of 1 prompts, got 2"),
        ("a", WHOLE, "must rise, got 0, 0, 1"),
        (None, AFTER, r"must begin at 0 seconds, got 0\.5, 1"),
    ],
)
def test_schedules_that_are_none_or_do_not_go_with_the_prompts_are_refused(prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        as_schedules(prompt, changes)


# --- conditions of a video -------------------------------------------------------------------------------------------


# Blocks of 2 latent frames at 10 frames a second: video frames 0 to 8, 9 to 24, 25 to 40, of which 4, 17, 33 are in
# the middle.
MIDDLES = [0.4, 1.7, 3.3]


def told(conditions, number, frame):
    return conditions.at_frame(frame).prompt_embeds[number]


def test_a_block_is_told_the_prompt_that_is_in_force_in_its_middle(encoded):
    schedules = [schedule((0, "a cat"), (1.7, "a dog barks")), schedule((0, "no change"))]
    conditions = embed_schedules(make_pipeline(), schedules, 41, LENGTH, 1)
    assert conditions.prompt_embeds.dtype == torch.float64
    assert conditions.prompt_of_frame.shape == (2, 6)
    for frame, second in enumerate(itertools.chain.from_iterable([middle] * 2 for middle in MIDDLES)):
        for number, each in enumerate(schedules):
            assert torch.equal(told(conditions, number, frame), padded(each.at(second)).double())
    assert encoded.texts == encoded.measured == ["a cat", "a dog barks", "no change"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_schedule_is_that_of_so_many_videos_side_by_side(encoded, count):
    schedules = [schedule((0, "a cat"), (1.6, "a dog")), schedule((0, "a fish"), (3.2, "a bird"))]
    conditions = embed_schedules(make_pipeline(), schedules, 41, LENGTH, count)
    assert conditions.prompt_embeds.shape[0] == conditions.prompt_of_frame.shape[0] == 2 * count
    for number, (first, last) in enumerate([("a cat", "a dog")] * count + [("a fish", "a bird")] * count):
        assert torch.equal(told(conditions, number, 0), padded(first).double())
        assert torch.equal(told(conditions, number, 5), padded(last).double())
    plain = embed_schedules(make_pipeline(), [schedule((0, "a cat")), schedule((0, "a dog"))], 41, LENGTH, count)
    assert plain.prompt_of_frame is None
    assert torch.equal(
        plain.prompt_embeds, torch.stack([padded("a cat")] * count + [padded("a dog")] * count).double()
    )


def test_of_prompts_that_no_block_sees_the_first_is_said_and_none_is_encoded(encoded, caplog):
    schedules = [schedule((0, "a cat"), (0.5, "unseen too"), (0.6, "unseen"), (1.2, "a dog"))]
    embed_schedules(make_pipeline(), schedules, 41, LENGTH, 1)
    (record,) = caplog.records
    assert record.message == "the prompt 'unseen' is not seen: none of the blocks has it in force in its middle"
    assert encoded.texts == ["a cat", "a dog"]
    caplog.clear()
    embed_schedules(make_pipeline(), [schedule((0, "a cat"), (0.6, "a dog"))], 41, LENGTH, 1)
    assert not caplog.records


@pytest.mark.parametrize(("last", "num_frames"), [(1.7, 4), (1.71, 6), (3.3, 6), (4.0, 8)])
def test_a_video_without_end_is_told_of_until_its_last_prompt_has_begun(encoded, last, num_frames):
    """The middles go on: 4, 17, 33, 49 tenths of a second."""
    pipeline = make_pipeline(local_attn_size=4)
    schedules = [schedule((0, "a cat"), (last, "a dog")), schedule((0, "a fish"), (0.1, "a bird"))]
    conditions = embed_schedules(pipeline, schedules, None, LENGTH, 1)
    assert conditions.prompt_of_frame.shape == (2, num_frames)
    assert torch.equal(told(conditions, 0, num_frames - 1), padded("a dog").double())
    assert torch.equal(told(conditions, 0, num_frames - 3), padded("a cat").double())
    assert torch.equal(told(conditions, 0, 100), padded("a dog").double())


def test_prompts_that_begin_when_the_video_is_over_are_refused(encoded):
    assert embed_schedules(make_pipeline(), [schedule((0, "a"), (4.09, "b"))], 41, LENGTH, 1) is not None
    with pytest.raises(ValueError, match=r"before the video ends, which is at 4\.1 s, got 4\.1 s"):
        embed_schedules(make_pipeline(), [schedule((0, "a")), schedule((0, "a"), (4.1, "b"))], 41, LENGTH, 1)


def test_a_video_of_one_block_has_no_prompts_that_change(encoded):
    message = r"^prompts change from block to block, but the video is one block of 2 latent frames; give one prompt"
    with pytest.raises(ValueError, match=message):
        embed_schedules(make_pipeline(), [schedule((0, "a"), (0.2, "b"))], 9, LENGTH, 1)
    with pytest.raises(ValueError, match="one block of 6 latent frames"):
        check_has_blocks([6])
    check_has_blocks([1, 1])
    assert encoded.texts == []


def test_a_clip_with_a_prompt_a_frame_is_told_that_of_the_frame_in_the_middle_of_each_block(encoded):
    prompt = tuple("a" if frame < 17 else "b" for frame in range(41))
    conditions = embed_frame_prompts(make_pipeline(), prompt, 6, LENGTH)
    for frame, text in enumerate("aabbbb"):
        assert torch.equal(told(conditions, 0, frame), padded(text))
    assert encoded.texts == ["a", "b"]


def test_a_clip_with_one_prompt_is_told_that(encoded):
    conditions = embed_frame_prompts(make_pipeline(), "a cat", 6, LENGTH)
    assert conditions.prompt_of_frame is None
    assert torch.equal(conditions.prompt_embeds, padded("a cat")[None])


# --- prompts that are asked for --------------------------------------------------------------------------------------


def test_a_function_is_asked_at_the_middle_of_each_block_and_only_another_prompt_is_encoded(encoded):
    answers = iter(["a cat", None, "a dog barks", "a dog barks", "a cat"])
    asked, before = [], Conditions(prompt_embeds=torch.zeros(2, LENGTH, 2, dtype=torch.float64))

    def ask(seconds):
        asked.append(seconds)
        return next(answers)

    following = as_next_conditions(make_pipeline(), "a cat", ask, before, LENGTH)
    found = [following(start, 2) for start in range(0, 10, 2)]
    assert asked == [0.4, 1.7, 3.3, 4.9, 6.5]
    assert [each is None for each in found] == [True, True, False, True, False]
    for each, text in ((found[2], "a dog barks"), (found[4], "a cat")):
        assert each.prompt_embeds.dtype == torch.float64
        assert torch.equal(each.prompt_embeds, torch.stack([padded(text)] * 2).double())
    assert encoded.texts == ["a dog barks", "a cat"]


@pytest.mark.parametrize("answer", [3, ["a"], b"a"])
def test_a_function_that_gives_no_prompt_is_refused(encoded, answer):
    before = Conditions(prompt_embeds=torch.zeros(1, LENGTH, 2))
    following = as_next_conditions(make_pipeline(), "a cat", lambda seconds: answer, before, LENGTH)
    with pytest.raises(ValueError, match="must give a prompt, or None for no change, got") as error:
        following(0, 2)
    assert repr(answer) in str(error.value)


def test_what_is_no_function_is_asked_nothing():
    for changes in (None, [(1, "a")], WHOLE):
        assert as_next_conditions(make_pipeline(), "a", changes, None, LENGTH) is None
