"""What the tests of the two retrieval caches share: small settings, models made once, a layer driver."""

import functools

import torch

from hf_ext import HybridKVCache, HybridKVConfig, SentenceKVCache, SentenceKVConfig
from hf_ext.tiny import ARCHITECTURES, tiny_model
from tests.cache_impls.helpers import Driver


# With ALiBi, or without a full-attention layer: refused, see test_retrieval_errors.py.
REFUSED = ("bloom", "mistral_sliding")
SERVED = sorted(set(ARCHITECTURES) - set(REFUSED))
CACHES = {"sentencekv": (SentenceKVCache, SentenceKVConfig), "hybridkv": (HybridKVCache, HybridKVConfig)}
# Small enough for the prompts of most tests to be stored.
EDGES = {"sink_tokens": 4, "recent_tokens": 8}
TIGHT = {**EDGES, "token_budget": 64}

model_of = functools.cache(tiny_model)


def make(name, model, **settings):
    cache_class, config_class = CACHES[name]
    return cache_class(model, config_class(**settings))


def choose_everything(cache):
    """From now on every stored token is retrieved, although the cache was filled under a small budget."""
    cache.config.token_budget = 10**6


def stored_tokens(cache):
    return sum(layer.stored for layer in cache.kv_layers)


def feed(model, cache, inputs, blocks):
    """Logits of the prompt's last token, then those of each later block `(B, Q)` of ids, all `(B, Q, V)`."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = [model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1:]]
    for block in blocks:
        more = torch.ones_like(block)
        mask = torch.cat([mask, more], dim=1)
        positions = positions[:, -1:] + more.cumsum(1)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        found.append(model(input_ids=block, **options).logits)
    return found


def later(rows, sizes, seed=3):
    """Ids of later blocks of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 128, (rows, sum(sizes)), generator=generator).split(sizes, dim=1))


def assert_close(found, expected, atol=1e-5):
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            one, other, atol=atol, rtol=1e-5, msg=lambda text, step=step: f"block {step}: {text}"
        )


def attended_places(layer):
    """Places in the text that the newest token of a layer with stores attended to at full rank, a set for each row and
    key/value head; padding left out."""
    batch, heads = layer.full[0].data.shape[:2]
    shown = layer.shown if layer.shown is not None else torch.ones_like(layer.chosen, dtype=torch.bool)
    where = layer.places_of(layer.chosen, layer.chosen.shape).expand(-1, heads, -1)
    found = []
    for row in range(batch):
        sinks = range(layer.sinks) if layer.sink_places is None else layer.sink_places[row].tolist()
        edge = [*sinks, *range(layer.seen - layer.newest, layer.seen)]
        hidden = set() if layer.hidden is None else set(layer.hidden[row].nonzero().flatten().tolist())
        for head in range(heads):
            middle = where[row, head][shown[row, head]].tolist()
            assert len(set(edge + middle)) == len(edge) + len(middle), "a token takes part twice"
            found.append(set(edge + middle) - hidden)
    return found


class RetrievalDriver(Driver):
    """One layer of a retrieval cache, fed ids as well; `attended` holds the places of each block's full-rank tokens."""

    def __init__(self, name="sentencekv", ids=None, **settings):
        self.name, self.ids, self.attended = name, ids, []
        super().__init__(**settings)

    def make_cache(self, settings):
        return make(self.name, self.config, **settings)

    def feed(self, query, key, value):
        start, stop = self.layer.seen, self.layer.seen + key.shape[2]
        if self.name == "sentencekv":
            shown = torch.arange(stop) >= (torch.zeros(self.batch, 1) if self.pads is None else self.pads[:, None])
            ids = None if self.ids is None else self.ids[:, start:stop]
            self.cache.observe_tokens(ids, self.batch, stop - start, shown.long())
        settle = self.layer.settle

        def note(context):
            self.note()
            settle(context)

        self.layer.settle = note
        try:
            return super().feed(query, key, value)
        finally:
            del self.layer.settle

    def note(self):
        """Runs between the attention of a block and what is stored after it."""
        layer = self.layer
        if getattr(layer, "stores", None) and layer.chosen is not None:
            self.attended.append(attended_places(layer))


def index_bytes(cache):
    """Bytes that may grow with a text whose tokens are offloaded: index and marks."""
    total = 0
    for layer in cache.kv_layers:
        tiers = layer.tier_bytes()
        total += tiers["index"] + tiers["marks"]
    return total
