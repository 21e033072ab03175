"""`SentenceKVConfig(mode="paper")` against the slow oracle of `tests/reference/sentencekv.py`, token by token."""

import pytest
import torch

from hf_ext import CacheStateError, UnsupportedModelError
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, text_tensors
from tests.cache_impls.retrieval_helpers import RetrievalDriver, make, model_of
from tests.reference.sentencekv import PaperSentenceKV


PROMPT, STEPS, DIM, K, G = 150, 22, 16, 2, 2
PAPER = {
    "mode": "paper",
    "keep": 2.0,
    "token_budget": 48,
    "sink_tokens": 6,
    "recent_tokens": 10,
    "query_window": 8,
    "boundary_ids": [5],
}


def marked_ids(batch, length, seed, share=0.1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 100, (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < share, 5)


class PaperDriver(RetrievalDriver):
    """Notes which slots each token saw, a set for each row and head, counted from the first real one."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.visible, original = [], self.layer._visible

        def note():
            seen = original()
            slots = [
                [set((head.nonzero().flatten() - before).tolist()) for head, before in zip(row, first.tolist())]
                for row, first in zip(seen, self.layer.before)
            ]
            self.visible.append(slots)
            return seen

        self.layer._visible = note


def oracle(text, ids, row, pad, prompt=PROMPT, **changes):
    """Outputs `(T, H, D)` of the row's generated tokens, and the slots each head saw."""
    settings = {"token_budget": 48, "factor": 2.0, "window": 8, "start": 6, "recent": 10, **changes}
    slow = PaperSentenceKV(**settings)
    query, key, value = (t[row, :, pad:] for t in text)
    key, value = (t.repeat_interleave(G, dim=0) for t in (key, value))
    marks = (ids[row, pad:] == 5).tolist()
    start = prompt - pad
    slow.prefill(query[:, :start], key[:, :start], value[:, :start], marks[:start])
    outputs, seen = [], []
    for place in range(start, query.shape[1]):
        output, attended = slow.step(query[:, place], key[:, place], value[:, place], marks[place], DIM**-0.5)
        outputs.append(output)
        slots = [{position: slot for slot, position in enumerate(own)} for own in slow.positions]
        seen.append([{at[p] for p in places} for at, places in zip(slots, attended)])
    return torch.stack(outputs).float(), seen


def compare(settings, changes, seed=0, pads=(0, 0), blocks=None, share=0.1, prompt=PROMPT):
    text = text_tensors(2, K, G, prompt + STEPS, DIM, seed=seed)
    ids = marked_ids(2, prompt + STEPS, seed, share)
    driver = PaperDriver(ids=ids, pads=pads if any(pads) else None, **{**PAPER, **settings})
    found = torch.cat(driver.feed_text(text, prompt, blocks)[1:], dim=1)
    for row, pad in enumerate(pads):
        expected, seen = oracle(text, ids, row, pad, prompt, **changes)
        assert [step[row] for step in driver.visible] == seen
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)
    return driver


@pytest.mark.parametrize("seed", range(3))
def test_every_token_sees_what_the_oracle_sees(seed):
    compare({}, {}, seed)


SETTINGS = {
    "all_kept": ({"keep": 10.0}, {"factor": 10.0}),
    "fractional": ({"keep": 1.26}, {"factor": 1.26}),
    "threshold": ({"length_threshold": 4}, {"length_threshold": 4}),
    "retrieval_at_once": ({"length_threshold": 0}, {"length_threshold": 0}),
    "no_edges": ({"sink_tokens": 0, "recent_tokens": 1}, {"start": 0, "recent": 1}),
    "window": ({"query_window": 40}, {"window": 40}),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_setting_means_what_it_does_in_the_oracle(kind):
    settings, changes = SETTINGS[kind]
    compare(settings, changes, seed=7)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_few_and_many_sentences(share):
    compare({}, {}, seed=3, share=share)


@pytest.mark.parametrize("pads", [(37, 3), (0, 120)])
def test_a_padded_row_is_the_row_without_padding(pads):
    compare({}, {}, seed=4, pads=pads)


@pytest.mark.parametrize("prompt", [5, 60])
def test_short_prompts_are_kept_whole(prompt):
    compare({}, {}, seed=5, prompt=prompt)


@pytest.mark.parametrize("blocks", [[7, 1, 14], [22]])
def test_a_block_of_tokens_is_the_tokens_one_by_one(blocks):
    compare({}, {}, seed=6, blocks=blocks)


def test_the_paper_hides_what_is_being_written_beyond_the_recent_tokens():
    """The trap the default mode avoids."""
    driver = compare({}, {}, seed=3, share=0.0)
    assert all(slot not in head for head in driver.visible[-1][0] for slot in range(96 + 2, 96 + STEPS - 10))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_paper_mode_generates_reorders_and_counts_its_bytes(arch):
    model, inputs = model_of(arch), prompts(length=150)
    cache = make("sentencekv", model, **PAPER)
    found = generate(model, cache, inputs)
    assert cache.nbytes() >= sum(cache.tier_bytes().values()) > 0
    beams = make("sentencekv", model, **PAPER)
    generate(model, beams, inputs, num_beams=3, max_new_tokens=6)
    flipped = {key: value.flip(0) for key, value in inputs.items()}
    again = generate(model, make("sentencekv", model, **PAPER), flipped)
    assert again.flip(0).tolist() == found.tolist()


def test_the_paper_mode_within_its_retention_is_dense_at_the_start_of_a_sentence():
    model, inputs = model_of("llama"), prompts(length=60)
    settings = {**PAPER, "length_threshold": 1000}
    expected = generate(model, None, inputs)
    assert generate(model, make("sentencekv", model, **settings), inputs).tolist() == expected.tolist()


def test_what_the_paper_mode_cannot_do_is_a_typed_error():
    model, inputs = model_of("llama"), prompts(length=150)
    cache = make("sentencekv", model, **PAPER)
    generate(model, cache, inputs)
    with pytest.raises(CacheStateError, match=r'mode="paper".*use mode="default"'):
        cache.kv_layers[0].materialize()
    with pytest.raises(CacheStateError, match=r'mode="paper" cannot take tokens back'):
        cache.crop(-1)
    falcon = model_of("falcon")
    with pytest.raises(CacheStateError, match=r'mode="paper".*outside the cache'):
        generate(falcon, make("sentencekv", falcon, **PAPER), inputs)


def test_the_paper_mode_refuses_soft_capped_models_before_they_run():
    with pytest.raises(UnsupportedModelError, match=r'mode="default"'):
        make("sentencekv", tiny_model("gemma2"), **PAPER)


@torch.no_grad()
def test_padding_of_a_second_turn_is_hidden_or_refused():
    model, inputs, found = model_of("llama"), prompts(length=150, pad=0), []
    for padding in (0, 77):
        cache = make("sentencekv", model, **PAPER)
        model(**inputs, past_key_values=cache)
        more = prompts(length=30, pad=13, seed=4)
        more["input_ids"][1, :13] = padding
        mask = torch.cat([inputs["attention_mask"], more["attention_mask"]], dim=1)
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, 150:], "past_key_values": cache}
        try:
            found.append(model(input_ids=more["input_ids"], **options).logits[:, -1])
        except CacheStateError:
            return
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_masked_tokens_that_are_not_in_front_are_refused_under_the_right_name():
    model, inputs = model_of("llama"), prompts(length=150, pad=0)
    inputs["attention_mask"][1, -5:] = 0
    with pytest.raises(CacheStateError, match=r"padding_side='left'") as caught:
        model(**inputs, past_key_values=make("sentencekv", model, **PAPER))
    assert "ojakv" not in str(caught.value)
