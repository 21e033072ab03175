"""Key/value caches for `generate`. Installs as `hf_ext.cache_impls`.

`ojakv` is an online low-rank cache, `sentencekv` attends to a fixed number of retrieved tokens, `hybridkv` to retrieved
tokens exactly and to all others by codes, and `packed` is an exact one in preallocated pages. All stand on the same page
buffers and the same attention function. Import from the modules, or `from hf_ext import OjaKVCache, SentenceKVCache,
HybridKVCache, PackedCache`.
"""
