"""What the cache tests share: prompts, a generate call, a layer driven without a model, models that compress losslessly."""

import contextlib
from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig

from hf_ext import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls.attention import ATTENTION_NAME, kv_attention_forward
from hf_ext.cache_impls.store import OffloadedRows
from hf_ext.tiny import tiny_config, tiny_model


# Small enough for a prompt of a hundred tokens to be compressed and for updates to come every few steps.
SMALL = {"sink_tokens": 4, "recent_tokens": 6, "update_interval": 5}


def prompts(rows=2, length=40, pad=7, seed=0):
    """Token ids with the last row left-padded by `pad`, and the attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        ids[-1, :pad], mask[-1, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache, inputs, **kwargs):
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(**inputs, past_key_values=cache, **options)


def small_cache(model, **settings):
    return OjaKVCache(model, OjaKVConfig(**{**SMALL, **settings}))


def lossless_model(arch, rank=8, **overrides):
    """A tiny model whose keys and values lie in `rank` dimensions, so that compression to that rank loses nothing.

    Keys keep only some of the pairs of entries that rotate together; rotation leaves them in that subspace.
    """
    model = tiny_model(arch, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            key, value = layer.self_attn.k_proj, layer.self_attn.v_proj
            kept = torch.zeros(16, dtype=torch.bool)
            kept[1 : 1 + rank // 2] = True
            dropped = ~kept.repeat(2)
            key.weight[dropped] = 0
            value.weight.copy_(torch.randn(32, 32, generator=generator)[:, :rank] @ value.weight[:rank] / 2)
            for bias in (key.bias, value.bias):
                if bias is not None:
                    bias.zero_()
    return model


LOSSLESS = {**SMALL, "key_ratio": 0.25, "value_ratio": 0.25, "anchor_ratio": 0.1}


def text_tensors(batch, kv_heads, groups, length, dim, seed=0, drift=0.6, dtype=torch.float32):
    """Queries `(B, H, N, D)`, keys and values `(B, K, N, D)` with decaying spectra that move along the text."""
    generator = torch.Generator().manual_seed(seed)

    def stream(heads):
        noise = torch.randn(batch, heads, length, dim, generator=generator)
        noise = noise * torch.linspace(1.5, 0.15, dim)
        mixing = torch.linalg.qr(torch.randn(2, batch, heads, dim, dim, generator=generator)).Q
        share = drift * torch.linspace(0, 1, length)[:, None]
        return (noise @ mixing[0]) * (1 - share) + (noise @ mixing[1]) * share

    return stream(kv_heads * groups).to(dtype), stream(kv_heads).to(dtype), stream(kv_heads).to(dtype)


class Driver:
    """One layer of a cache, fed queries, keys and values as a model's attention would."""

    def __init__(self, batch=2, kv_heads=2, groups=2, dim=16, pads=None, softcap=None, **settings):
        self.config = tiny_config(
            "llama",
            num_attention_heads=kv_heads * groups,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            num_hidden_layers=1,
        )
        self.config._attn_implementation_internal = ATTENTION_NAME
        self.cache = self.make_cache(settings)
        self.layer = self.cache.layers[0]
        self.module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False, config=self.config)
        self.batch, self.softcap = batch, softcap
        self.pads = None if pads is None else torch.tensor(pads)

    def make_cache(self, settings):
        return OjaKVCache(self.config, OjaKVConfig(**{**SMALL, **settings}))

    def mask(self, start, stop):
        """Boolean `(B, 1, Q, N)`, or `None` where the library passes none: no padding, and first tokens or just one."""
        if self.pads is None and (start == 0 or stop - start == 1):
            return None
        causal = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        shown = torch.arange(stop) >= (torch.zeros(self.batch, 1) if self.pads is None else self.pads[:, None])
        return causal[None, None] & shown[:, None, None]

    def position_ids(self, start, stop):
        places = torch.arange(start, stop).expand(self.batch, -1)
        return places if self.pads is None else (places - self.pads[:, None]).clamp_min(0)

    def feed(self, query, key, value):
        """Attention output `(B, Q, H, D)` of the new tokens."""
        start = self.layer.seen
        block, _ = self.layer.update(key, value)
        stop = self.layer.seen
        output, _ = kv_attention_forward(
            self.module,
            query,
            block,
            block,
            self.mask(start, stop),
            scaling=query.shape[-1] ** -0.5,
            softcap=self.softcap,
            position_ids=self.position_ids(start, stop),
        )
        return output

    def feed_text(self, text, prompt, blocks=None):
        """The first `prompt` tokens at once, the others in blocks of the given sizes, or one by one."""
        query, key, value = text
        outputs, start = [], 0
        for size in [prompt, *(blocks or [1] * (key.shape[2] - prompt))]:
            part = slice(start, start + size)
            outputs.append(self.feed(query[:, :, part], key[:, :, part], value[:, :, part]))
            start += size
        return outputs


@contextlib.contextmanager
def untouched(model):
    """No forward call runs inside, and the model and its generation config end as they began."""
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    before = model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation
    yield
    handle.remove()
    assert not calls, "the model ran"
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation) == before


def reachable_bytes(root):
    """Bytes of the distinct storages found by following every attribute, list and dict from `root`; those of
    `OffloadedRows`, which are in a file or belong to the host, are left out."""
    storages, seen, waiting = {}, set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, PreTrainedConfig | OffloadedRows | str | type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(storages.values())
