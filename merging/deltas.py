"""Deltas: what a fine-tune added to its base, read tensor by tensor.

No paper; `osd` and `rmm` start from here. Walking two checkpoints holds one tensor of each and one float32 copy, however
large the models are. Two checkpoints that have no difference worth adding back (other vocabulary, quantised weights, a
head tied on one side only) are refused with the tensors named. `fingerprint` marks the base a delta belongs to.

Plugs in: folders of `save_pretrained`, Hub ids, any `torch.nn.Module`, all through `Checkpoint.open`.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.errors import DeltaError
from hf_ext.merging.checkpoints import Checkpoint, listed


__all__ = [
    "Checkpoint",
    "DeltaEntry",
    "delta",
    "delta_entries",
    "fingerprint",
    "iter_deltas",
    "matches",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDINGS_OR_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$"
)
# Elements worked on at a time: the temporaries of one step stay at a few megabytes.
_CHUNK = 1 << 18
_SAMPLES = 256
_known_pairs: weakref.WeakKeyDictionary[Checkpoint, weakref.WeakKeyDictionary[Checkpoint, dict[str, str]]]
_known_pairs = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class DeltaEntry:
    """One tensor that a delta has.

    Args:
        name (`str`): Its name in the base.
        shape (`tuple[int, ...]`): Shape, the same on both sides.
        kind (`str`): Layer kind, as `Checkpoint.kind` gives it.
        nbytes (`int`): Bytes of the fine-tuned tensor as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


def delta_entries(base: Checkpoint, tuned: Checkpoint) -> list[DeltaEntry]:
    """What the delta of two checkpoints consists of, in the order of the base. Only names, shapes and types are read.

    Names may differ by one prefix (`model.`, `base_model.model.`, `_orig_mod.` ...) that a wrapper put in front of them.

    Args:
        base (`Checkpoint`): Where the fine-tune started.
        tuned (`Checkpoint`): The fine-tuned model.

    Returns:
        `list[DeltaEntry]`: One per weight; tied weights once.

    Raises:
        `DeltaError`: the two have no difference that could be added back: other tensors or shapes, quantised weights,
            or a head that is tied on one side only.
    """
    pairs = _pairs(base, tuned)
    return [_entry(base, tuned, name, other) for name, other in pairs.items()]


def delta(base: Checkpoint, tuned: Checkpoint, name: str) -> Tensor:
    """`tuned - base` of one weight.

    Both are widened to float32 first, which is exact (float64 weights are subtracted as such, then rounded).

    Args:
        base (`Checkpoint`): Where the fine-tune started.
        tuned (`Checkpoint`): The fine-tuned model.
        name (`str`): Name of the weight in the base.

    Returns:
        `Tensor`: `base.shape(name)`, float32, new memory.

    Raises:
        `DeltaError`: as `delta_entries`, and for weights that are not finite.
    """
    pairs = _pairs(base, tuned)
    return _difference(base, tuned, base.tied.get(name, name), _other(pairs, base, name))


def iter_deltas(
    base: Checkpoint, tuned: Checkpoint, names: Iterable[str] | None = None
) -> Iterator[tuple[DeltaEntry, Tensor]]:
    """Walk the delta of two checkpoints; besides what the caller keeps, one tensor of each side is in memory.

    Args:
        base (`Checkpoint`): Where the fine-tune started.
        tuned (`Checkpoint`): The fine-tuned model.
        names (`Iterable[str]`, *optional*): Weights to visit, in this order; all if not given.

    Returns:
        `Iterator[tuple[DeltaEntry, Tensor]]`: The entry and its float32 difference, as `delta` gives it.
    """
    pairs = _pairs(base, tuned)
    wanted = list(pairs) if names is None else [base.tied.get(name, name) for name in names]
    found = {name: _other(pairs, base, name) for name in wanted}

    def walk() -> Iterator[tuple[DeltaEntry, Tensor]]:
        for name in wanted:
            # No local name for the result: it would stay alive while the next one is made.
            yield _entry(base, tuned, name, found[name]), _difference(base, tuned, name, found[name])

    return walk()


def _entry(base: Checkpoint, tuned: Checkpoint, name: str, other: str) -> DeltaEntry:
    return DeltaEntry(name, base.shape(name), base.kind(name), tuned.nbytes(other))


def _other(pairs: dict[str, str], base: Checkpoint, name: str) -> str:
    try:
        return pairs[base.tied.get(name, name)]
    except KeyError:
        raise DeltaError(
            f"{name!r} is not a weight of {base.source}; expected a name of delta_entries(base, tuned)."
        ) from None


def _difference(base: Checkpoint, tuned: Checkpoint, name: str, other: str) -> Tensor:
    left, right = base.tensor(name).reshape(-1), tuned.tensor(other).reshape(-1)
    wide = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
    result = torch.empty(left.shape, dtype=torch.float32)
    for start in range(0, result.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = right[part].to(wide) - left[part].to(wide)
        if not torch.isfinite(result[part]).all():
            _refuse_not_finite(base, tuned, name, left[part], right[part])
    return result.reshape(base.shape(name))


def _refuse_not_finite(base: Checkpoint, tuned: Checkpoint, name: str, left: Tensor, right: Tensor) -> None:
    for side, source, values in (("base", base.source, left), ("tuned", tuned.source, right)):
        if bad := int((~torch.isfinite(values)).sum()):
            raise DeltaError(
                f"{name} of the {side} checkpoint {source} holds NaN or infinite values ({bad} in the first block that "
                "has any); expected finite weights; use an earlier step of the training, or save it in bfloat16 if "
                "float16 overflowed."
            )
    raise DeltaError(
        f"{name} differs by more than float32 can hold between {base.source} and {tuned.source}; expected the "
        "difference of a fine-tune; check that both are the same model."
    )


def _pairs(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Name in the base -> name in the fine-tune, after every check that needs no values. Remembered."""
    known = _known_pairs.setdefault(base, weakref.WeakKeyDictionary())
    if tuned not in known:
        known[tuned] = _checked_pairs(base, tuned)
    return known[tuned]


def _checked_pairs(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    _refuse_quantised("base", base)
    _refuse_quantised("tuned", tuned)
    options = [("", ""), *((start, "") for start in _wrappers(base, tuned))]
    options += [("", start) for start in _wrappers(tuned, base)]
    for ours, theirs in options:
        left, right = _stripped(base.names, ours), _stripped(tuned.names, theirs)
        left_tied, right_tied = _stripped(base.tied, ours), _stripped(tuned.tied, theirs)
        if left.keys() - right_tied.keys() == right.keys() - left_tied.keys():
            break
    else:
        raise _not_the_same(base, tuned)
    for short in left.keys() & right_tied.keys():
        raise _one_sided_head("base", base, left[short], "tuned", tuned)
    for short in right.keys() & left_tied.keys():
        # A copy of the embedding that was stored as a weight of its own is still a tied head.
        canonical = right.get(base.tied[left_tied[short]].removeprefix(ours))
        if canonical is None or not tuned.same_bits(right[short], canonical):
            raise _one_sided_head("tuned", tuned, right[short], "base", base)
    pairs = {name: right[short] for short, name in left.items()}
    _refuse_other_shapes(base, tuned, pairs)
    for name, other in pairs.items():
        if (name in base.converted) != (other in tuned.converted):
            raise DeltaError(
                f"{name} is laid out differently in {base.source} and {tuned.source}, because transformers reshapes "
                "it while loading; expected both as folders or both as live models; save the live one first."
            )
    return pairs


def _stripped(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names without the prefix -> names; as they are, if two would become one."""
    names = list(names)
    short = {name.removeprefix(prefix): name for name in names}
    return short if len(short) == len(names) else {name: name for name in names}


def _wrappers(wrapped: Checkpoint, plain: Checkpoint) -> list[str]:
    """Prefixes that, taken off a name of the first, leave a name of the second."""
    known = {*plain.names, *plain.tied}
    for name in wrapped.names:
        parts = name.split(".")
        starts = [".".join(parts[:cut]) + "." for cut in range(1, len(parts) - 1)]
        if name not in known and (fits := [start for start in starts if name.removeprefix(start) in known]):
            return fits
    return []


def _refuse_quantised(side: str, checkpoint: Checkpoint) -> None:
    bad = [name for name in checkpoint.names if checkpoint.dtype(name) not in _FLOATS]
    if bad:
        how = f" (quantised with {checkpoint.quantised})" if checkpoint.quantised else ""
        types = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in bad})
        raise DeltaError(
            f"the {side} checkpoint {checkpoint.source} stores {listed(bad)} as {', '.join(types)}{how}; expected "
            f"float weights, because codes of two quantisers have no difference; give the unquantised {side} model."
        )


def _not_the_same(base: Checkpoint, tuned: Checkpoint) -> DeltaError:
    """Why two sets of names do not fit together."""
    for side, checkpoint in (("base", base), ("tuned", tuned)):
        if checkpoint.quantised:
            return DeltaError(
                f"the {side} checkpoint {checkpoint.source} is quantised with {checkpoint.quantised}, so its weights "
                f"are not under their names; expected float weights; give the unquantised {side} model."
            )
        if adapters := [name for name in checkpoint.names if "lora_" in name]:
            return DeltaError(
                f"the {side} checkpoint {checkpoint.source} still carries an adapter ({listed(adapters)}); expected "
                "plain weights; give the result of merge_and_unload()."
            )
    # Heads are called the same in most architectures.
    if all(_EMBEDDINGS_OR_HEAD.search(name) for name in set(base.names) & set(tuned.names)):
        return DeltaError(
            f"{base.source} and {tuned.source} have no layer in common (the first tensors are {base.names[0]} and "
            f"{tuned.names[0]}); expected a base and its fine-tune; check that both are the same architecture."
        )
    left, right = {*base.names, *base.tied}, {*tuned.names, *tuned.tied}
    only = [name for name in base.names if name not in right], [name for name in tuned.names if name not in left]
    texts = [f"{listed(names)} only in the {side}" for side, names in zip(("base", "tuned"), only) if names]
    hint = ""
    if base.converted or tuned.converted:
        hint = " Transformers stacks some of these while loading: give both as folders or both as live models."
    return DeltaError(
        f"{base.source} and {tuned.source} do not hold the same tensors: {'; '.join(texts)}. Expected the same model on "
        f"both sides; save both with the same class (such as AutoModelForCausalLM).{hint}"
    )


def _one_sided_head(side: str, own: Checkpoint, name: str, other: str, tied: Checkpoint) -> DeltaError:
    return DeltaError(
        f"{name} is a weight of its own in the {side} checkpoint {own.source}, but tied to the embedding in the {other} "
        f"checkpoint {tied.source}; expected the same on both sides, because one change cannot serve both uses of a tied "
        f"weight; save the {other} model with tie_word_embeddings=False and a copied head, or fine-tune with the ties of "
        "the base."
    )


def _refuse_other_shapes(base: Checkpoint, tuned: Checkpoint, pairs: dict[str, str]) -> None:
    bad = {name: other for name, other in pairs.items() if base.shape(name) != tuned.shape(other)}
    if not bad:
        return
    texts = [f"{name} {base.shape(name)} -> {tuned.shape(other)}" for name, other in bad.items()]
    rows = [(base.shape(name), tuned.shape(other)) for name, other in bad.items()]
    if all(_EMBEDDINGS_OR_HEAD.search(name) for name in bad) and all(a[1:] == b[1:] for a, b in rows):
        raise DeltaError(
            f"the vocabulary was resized from {rows[0][0][0]} to {rows[0][1][0]} rows ({listed(texts)}); expected the "
            "same tokens on both sides; keep the base vocabulary when fine-tuning, or call "
            f"resize_token_embeddings({rows[0][1][0]}) on the base first."
        )
    raise DeltaError(
        f"tensors changed shape between {base.source} and {tuned.source}: {listed(texts)}; expected the same model on "
        "both sides; give the base that this fine-tune started from."
    )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A short mark of a base, the same whether it is loaded in float32, bfloat16 or float16.

    Hashes name, shape and at most 256 evenly spaced values of every tensor, rounded to bfloat16; the second digest
    rounds to float16 before. Take it from the base as it is stored: values that were rounded to bfloat16 earlier can
    round to another float16. It tells bases apart, it does not prove that every value is equal.

    Args:
        tensors (`Iterable[tuple[str, Tensor]]`): Names and weights of any shape; their order counts.

    Returns:
        `dict[str, str]`: `{"bfloat16": ..., "float16": ...}`, 16 hexadecimal digits each.
    """
    digests = {"bfloat16": hashlib.blake2b(digest_size=8), "float16": hashlib.blake2b(digest_size=8)}
    for name, tensor in tensors:
        header = json.dumps([name, list(tensor.shape)]).encode()
        values = _sample(tensor.detach())
        for kind, rounded in (("bfloat16", values), ("float16", values.to(torch.float16))):
            digests[kind].update(header)
            words = rounded.to(torch.bfloat16).view(torch.int16).numpy()
            digests[kind].update(words.astype("<i2").tobytes())
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def matches(stored: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether a stored fingerprint belongs to these tensors.

    Args:
        stored (`dict[str, str]`): What `fingerprint` gave for the base.
        tensors (`Iterable[tuple[str, Tensor]]`): The same names and order; float32, bfloat16 or float16.

    Returns:
        `bool`: One equal digest is enough: the float16 one is what a base loaded in float16 still shares.
    """
    found = fingerprint(tensors)
    return any(stored.get(kind) == digest for kind, digest in found.items())


def _sample(tensor: Tensor) -> Tensor:
    """`(S,)`: at most 256 values at evenly spaced positions, the first and the last included, on the CPU."""
    total = tensor.numel()
    count = min(total, _SAMPLES)
    if tensor.dim() == 0 or total == 0:
        return tensor.reshape(-1).cpu()
    positions = torch.arange(count) * (total - 1) // max(count - 1, 1)
    # By coordinates: flattening a transposed view would copy all of it.
    return tensor[tuple(index.to(tensor.device) for index in torch.unravel_index(positions, tensor.shape))].cpu()
