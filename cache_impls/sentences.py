"""Which token ids end a sentence, derived from a tokenizer or checked when given as a list.

SentenceKV cuts a prompt behind its punctuation tokens. The code released with the paper looks up thirteen strings; on
many tokenizers most of them are no vocabulary item, and items such as `."`, `.)` or `?\\n` are missed. Here every
vocabulary item is decoded and its text judged, so the answer is right for byte-level BPE, SentencePiece and WordPiece.

One id is judged at a time, without its neighbours. Four things follow:

- The dot of `3.14` and of `e.g.` counts where it is the same id as a full stop.
- A blank line written as two ids of one newline each is not seen: always in Llama 2, in front of a word in GPT-2 and
  SmolLM2.
- A closing quote that is an id of its own, behind the mark, falls to the next sentence.
- A mark whose UTF-8 bytes are spread over several ids (`。` in a small byte-level vocabulary) is not seen: its last byte
  ends other characters too. A cache that uses these ids must cut long stretches without any by itself.

Shapes: B batch, N tokens, M boundary ids.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase

from hf_ext.errors import ConfigError


# Latin, CJK (full and half width), Arabic and Urdu, Devanagari.
_MARKS = ".!?…。！？｡．؟۔।॥"
# Left-pointing quotes close in German, Danish and others. No `>`: `?>` and `.>` are code far more often than text.
_CLOSERS = "\"')]}’”‘“»›«‹」』）］｝】》〉〕〗〙〛｣｠〞〟＂＇"
_SENTENCE_END = re.compile(rf"[{re.escape(_MARKS)}][\s{re.escape(_CLOSERS)}]*\Z")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def sentence_boundary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all vocabulary items that end a sentence, ascending.

    An item does when its decoded text, without trailing blanks and closing quotes or brackets, ends in `.`, `!`, `?`,
    `…` or a CJK, Arabic or Devanagari mark, or when it contains a blank line. Added tokens count like all others.
    Special tokens (end of text, chat markers, padding) never do: they separate texts, not sentences.

    Decodes the whole vocabulary, seconds for a large one: call it once and keep the list.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of any kind, fast or not.

    Raises:
        `ConfigError`: `tokenizer` is something else, or none of its items ends a sentence.
    """
    ids = _mark_ids(tokenizer, _known_ids(tokenizer))
    if not ids:
        raise ConfigError(
            f"tokenizer={type(tokenizer).__name__} must have a vocabulary item that ends a sentence, but none of its "
            f"{len(tokenizer)} does; give boundary_ids instead."
        )
    return ids


def resolve_boundaries(
    tokenizer: PreTrainedTokenizerBase | None, boundary_ids: Collection[int] | Tensor | None, vocab_size: int
) -> Tensor | None:
    """The boundary ids a cache works with, `(M,)` int64, ascending and distinct; `None` when neither source is given.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): source of the ids, or a check on the given ones.
        boundary_ids (`list[int]`, *optional*): the ids themselves; also a tuple, set, range, array or tensor.
        vocab_size (`int`): ids the model knows, 0 to `vocab_size - 1`.

    Raises:
        `ConfigError`: the list is empty, holds something else than whole numbers or an id outside the vocabulary;
            `tokenizer` is not one, has no sentence mark, or has one outside the model's vocabulary;
            both are given and an id is no sentence mark of the tokenizer.
    """
    if boundary_ids is None:
        if tokenizer is None:
            return None
        ids = sentence_boundary_ids(tokenizer)
        if outside := [i for i in ids if i >= vocab_size]:
            raise ConfigError(
                f"tokenizer={type(tokenizer).__name__} has sentence marks beyond the {vocab_size} ids of the model: "
                f"{_name_some(tokenizer, outside)}; use the model's own tokenizer, or resize the model's embeddings."
            )
        return torch.tensor(ids, dtype=torch.int64)

    ids = _check_ids(boundary_ids, vocab_size)
    if tokenizer is not None:
        marks = set(_mark_ids(tokenizer, set(ids) & _known_ids(tokenizer)))
        if wrong := [i for i in ids if i not in marks]:
            raise ConfigError(
                "boundary_ids must be sentence marks of the tokenizer given with them, but these are not: "
                f"{_name_some(tokenizer, wrong)}; leave them out, give boundary_ids without a tokenizer to use them as "
                "they are, or give the tokenizer alone."
            )
    return torch.tensor(ids, dtype=torch.int64)


def is_boundary(ids: Tensor, boundary_ids: Tensor) -> Tensor:
    """Where a token ends a sentence.

    Args:
        ids (`Tensor`): token ids, `(B, N)`.
        boundary_ids (`Tensor`): `(M,)`, from `resolve_boundaries`; copied to the device of `ids` where it is not there.

    Returns:
        `Tensor`: `(B, N)`, boolean.
    """
    return torch.isin(ids, boundary_ids.to(ids.device))


def _check_ids(boundary_ids: Collection[int] | Tensor, vocab_size: int) -> list[int]:
    """The distinct ids, ascending."""
    values = boundary_ids.tolist() if isinstance(boundary_ids, (Tensor, np.ndarray)) else boundary_ids
    hint = "give the ids of the tokens that end a sentence, for example sentence_boundary_ids(tokenizer)."
    if not isinstance(values, (list, tuple, set, frozenset, range)):
        raise ConfigError(f"boundary_ids={values!r} must be a list of token ids; {hint}")
    if not values:
        raise ConfigError(f"boundary_ids={values!r} must hold at least one token id; {hint}")
    if wrong := [repr(value) for value in values if not isinstance(value, Integral) or isinstance(value, bool)]:
        raise ConfigError(f"boundary_ids must hold whole numbers only, but holds {_some(wrong)}; {hint}")
    ids = sorted({int(value) for value in values})
    if wrong := [str(i) for i in ids if not 0 <= i < vocab_size]:
        raise ConfigError(
            f"boundary_ids must lie between 0 and {vocab_size - 1}, the ids of the model, but hold {_some(wrong)}; {hint}"
        )
    return ids


def _known_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"tokenizer={tokenizer!r} must be a tokenizer of transformers; load one with AutoTokenizer.from_pretrained, "
            "take the .tokenizer of a processor, or wrap one of the tokenizers library as "
            "PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    return set(tokenizer.get_vocab().values())


def _mark_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[int]:
    """Those of the known `ids` that end a sentence, ascending."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in _added_tokens(tokenizer).items() if token.special}
    texts = _texts(tokenizer, sorted(set(ids) - special))
    return [i for i, text in texts.items() if _SENTENCE_END.search(text) or _BLANK_LINE.search(text)]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> dict[int, str]:
    # Decoded one by one, so that blanks and newlines stay as they are and no neighbour changes the text.
    # An added token is stored as plain text; a byte-level decoder would take its `»` for a raw byte.
    added = _added_tokens(tokenizer)
    plain = [i for i in ids if i not in added]
    decoded = tokenizer.batch_decode([[i] for i in plain], clean_up_tokenization_spaces=False) if plain else []
    texts = dict(zip(plain, decoded))
    return {i: added[i].content if i in added else texts[i] for i in ids}


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    try:
        return tokenizer.added_tokens_decoder
    except NotImplementedError:  # the Mistral backend has none
        return {}


def _name_some(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The first few ids with their text, for a message."""
    known = _known_ids(tokenizer)
    texts = _texts(tokenizer, [i for i in ids if i in known])
    return _some([f"{i} ({texts[i]!r})" if i in known else f"{i} (not in the tokenizer)" for i in ids])


def _some(items: list[str], count: int = 5) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
