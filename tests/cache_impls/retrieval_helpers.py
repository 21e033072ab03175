"""What the tests of the two retrieval caches share: small settings, models made once, a layer driver."""

import functools

import torch

from hf_ext import HybridKVCache, HybridKVConfig, SentenceKVCache, SentenceKVConfig
from hf_ext.cache_impls.attention import dense_attention
from hf_ext.cache_impls.retrieval import PAGE
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


class HybridDriver(RetrievalDriver):
    """Notes for each block the output there should be: sinks, newest and fetched tokens as they came, all others as their
    codes say, or as the mean codes of their page where it is not read."""

    def __init__(self, **settings):
        self.expected = []
        super().__init__("hybridkv", **settings)

    def feed_text(self, text, prompt, blocks=None):
        self.text = text
        return super().feed_text(text, prompt, blocks)

    def feed(self, query, key, value):
        self.query = query
        return super().feed(query, key, value)

    def stand_ins(self):
        """Keys and values `(B, K, M, D)` that stand for the stored tokens."""
        found = []
        for codes in (self.layer.index.codes, self.layer.value_codes):
            rows = codes.rows.rows.float()
            if self.layer.index.in_pages:
                pages = rows.unflatten(2, (-1, PAGE))
                read = torch.zeros(pages.shape[:3], dtype=torch.bool).scatter(2, self.layer.near, True)
                means = pages.mean(3, keepdim=True).round()
                rows = torch.where(read[..., None, None], pages, means).flatten(2, 3)
            found.append(codes.mean + rows @ codes.expand.mT)
        return found

    def note(self):
        layer = self.layer
        if not layer.stores:
            return
        start, stop = layer.seen - self.query.shape[2], layer.seen
        count, heads = layer.index.length, layer.full[0].data.shape[1]
        assert count == stop - layer.full[0].length
        exact = layer.kept_tokens.long() if layer.attends_to_store else layer.chosen
        shown = torch.ones_like(exact, dtype=torch.bool)
        if layer.shown is not None and not layer.attends_to_store:
            shown = layer.shown
        places = layer.places_of(None, torch.Size((self.batch, 1, count))).long().expand(-1, heads, -1)
        fetched = torch.zeros(self.batch, heads, count, dtype=torch.bool)
        for row in range(self.batch):
            for head in range(heads):
                own = exact[row, head][shown[row, head]]
                assert len(set(own.tolist())) == len(own), "a token takes part twice"
                fetched[row, head, own] = True
        states = []
        for tokens, others in zip(self.text[1:], self.stand_ins()):
            rebuilt = tokens[:, :, :stop].clone()
            where = places[..., None].expand(-1, -1, -1, tokens.shape[3])
            mixed = torch.where(fetched[..., None], rebuilt.gather(2, where), others)
            states.append(rebuilt.scatter(2, where, mixed))
        options = {"scaling": self.query.shape[3] ** -0.5, "softcap": self.softcap}
        self.expected.append(dense_attention(self.module, self.query, *states, self.mask(start, stop), **options)[0])

    def check(self, text, prompt, blocks=None):
        """Feeds the text and compares what came out of every block with what should."""
        found = self.feed_text(text, prompt, blocks)[1:]
        assert len(self.expected) == len(found) > 0
        assert_close(found, self.expected, atol=1e-4)


def index_bytes(cache):
    """Bytes that may grow with a text whose tokens are offloaded: index and marks."""
    total = 0
    for layer in cache.kv_layers:
        tiers = layer.tier_bytes()
        total += tiers["index"] + tiers["marks"]
    return total
