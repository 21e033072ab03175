"""Key/value caches for `generate`. Installs as `hf_ext.cache_impls`.

`ojakv` is an online low-rank cache, `packed` an exact one in preallocated pages; both stand on the same page buffers
and the same attention function. Import from the modules, or `from hf_ext import OjaKVCache, PackedCache`.
"""
