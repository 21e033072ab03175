"""`generate` for a model repository that wants our caches by name without registration.

Copy the folder `custom_generate` into the repository and call
`model.generate(**inputs, custom_generate="user/repo", trust_remote_code=True, cache_implementation="ojakv",
cache_config={"ratio": 0.4})`. transformers hands this function the two arguments before it validates them.
"""

from hf_ext.registration import CACHES, build_cache


def generate(model, *args, cache_implementation=None, cache_config=None, **kwargs):
    """The model's own `generate`, with the named cache of hf_ext built for it; other names pass through.

    Without a name it builds "ojakv", unless the caller brings a cache. A name of ours next to a cache is an error.
    """
    kwargs.pop("custom_generate", None)
    given = kwargs.get("past_key_values")
    if cache_implementation is None and given is None:
        cache_implementation = "ojakv"
    if cache_implementation in CACHES:
        if given is not None:
            raise ValueError(
                f"pass either cache_implementation={cache_implementation!r} or past_key_values, not both."
            )
        kwargs["past_key_values"] = build_cache(cache_implementation, model, cache_config)
    else:
        kwargs.update(cache_implementation=cache_implementation, cache_config=cache_config)
    return type(model).generate(model, *args, **kwargs)
