"""Prompts that are longer than the model reads."""

from types import SimpleNamespace

import pytest
import torch
from launching import ROOT
from transformers import AutoTokenizer

from causal_wan.model.text import PromptEncoder, encode_prompts, warn_of_cut_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "sketch" / "tiny-wan" / "tokenizer")


class Encoder:
    """Embeds a token as its number."""

    device = torch.device("cpu")

    def __call__(self, ids, mask):
        return SimpleNamespace(last_hidden_state=ids[..., None].float())


def test_prompts_that_are_cut_are_counted_and_the_first_is_named(tokenizer, caplog):
    prompts = ["a ball", "a ball" + " rolls" * 600, "", "a box" * 50, "a box" * 50]
    lengths = [len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
    assert warn_of_cut_prompts(tokenizer, prompts, 12) == 2
    (record,) = caplog.records
    assert "2 of 4 prompt(s) are cut at max_sequence_length=12 tokens" in record.getMessage()
    assert f"the first has {lengths[1]}: 'a ball rolls" in record.getMessage()
    assert len(record.getMessage()) < 400
    shown = [len(embed) for embed in encode_prompts(tokenizer, Encoder(), prompts, 12)]
    assert shown == [min(length, 12) for length in lengths]


def test_a_prompt_of_just_as_many_tokens_is_whole_and_nothing_is_said(tokenizer, caplog):
    length = len(tokenizer("a ball rolls").input_ids)
    assert warn_of_cut_prompts(tokenizer, ["a ball rolls"], length) == 0
    assert not caplog.records
    assert warn_of_cut_prompts(tokenizer, ["a ball rolls"], length - 1) == 1


def test_of_prompts_that_are_not_known_beforehand_the_first_that_is_cut_is_said(tokenizer, caplog):
    embeds = PromptEncoder(tokenizer, Encoder(), 12)
    assert len(embeds["a ball"]) < 12
    assert not caplog.records
    for number in range(3):
        assert len(embeds[f"{number} balls" + " roll" * 20]) == 12
    (record,) = caplog.records
    assert "'0 balls roll" in record.getMessage()
