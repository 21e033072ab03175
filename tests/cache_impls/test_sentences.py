"""Sentence marks of a vocabulary: judged by text, for every kind of tokenizer, and checked when given as a list."""

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_ext import ConfigError
from hf_ext.cache_impls.sentences import is_boundary, resolve_boundaries, sentence_boundary_ids


MARKS = [
    *[".", "!", "?", "...", "…", "?!", " .", "end.", "3."],
    *['."', ".'", ".)", '?"', "!]", ".}", '.")', ". ", ".\t", ".\n", '."\n', ". ) ", ".\u00a0", '. "'],
    *[".”", "?’", ".»", ".“", ".›", "….”"],
    *["。", "！", "？", "｡", "．", "。」", "。』", "！）", "？」\n", "。】", "。\u3000", "好。"],
    *["؟", "۔", "।", "॥"],
    *["\n\n", "\r\n\r\n", "\n \n", "\n\t\n    ", ".\n\n", ")\n\n    def", "\n\n\n"],
]
OTHERS = [
    *["word", "3.14", ".5", "e.g", "...and", ".x", "!=", "?:", ",", ";", ":", "-", "、", "，", "：", "·", "،"],
    *['"', ")", "」", "”", "'", " ", "\n", "\r\n", "\n  ", "\t\t", "a\nb", "\r\r", '"\n', ".(", ".「", "?>", ".`"],
    *["", "\ufffd", "。\ufffd"],
]


def word_level(items, **special):
    vocab = {item: i for i, item in enumerate(items)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="word")), **special)


def byte_level(merged):
    """All 256 bytes, and one item per text of `merged`, each built from left to right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {byte: i for i, byte in enumerate(alphabet)}, []
    for text in merged:
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
        for end in range(1, len(symbols)):
            merge = symbols[:end], symbols[end]
            if merge not in merges:
                merges.append(merge)
                vocab.setdefault("".join(merge), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(tokenizer, ids):
    return [tokenizer.decode([i]) for i in ids]


class PythonTokenizer(PreTrainedTokenizer):
    """A tokenizer without the Rust library."""

    def __init__(self, items, **kwargs):
        self.items = items
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.items)

    def get_vocab(self):
        return {item: i for i, item in enumerate(self.items)} | self.added_tokens_encoder

    def _convert_token_to_id(self, token):
        return self.items.index(token) if token in self.items else None

    def _convert_id_to_token(self, index):
        return self.items[index]


@pytest.mark.parametrize("text", MARKS, ids=ascii)
def test_item_ends_a_sentence(text):
    assert sentence_boundary_ids(word_level(["word", text])) == [1]


@pytest.mark.parametrize("text", OTHERS, ids=ascii)
def test_item_does_not_end_a_sentence(text):
    assert sentence_boundary_ids(word_level([".", text])) == [0]


def test_byte_level_bpe():
    merged = ['."', ".)", '?"', ".\n", "\n\n", " .", " word", "...", "3.14", "。", " »", ".»"]
    tokenizer = byte_level(merged)
    found = sentence_boundary_ids(tokenizer)
    assert set(texts(tokenizer, found)) == {
        *["!", "?", ".", "..", "...", "3."],
        *['."', ".)", '?"', ".\n", "\n\n", " .", "。", ".»"],
    }
    for text in merged:  # each is one item, and judged as that text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert (ids[0] in found) == (text not in (" word", "3.14", " »"))


def test_mark_in_pieces_of_bytes_is_not_found():
    tokenizer = byte_level(["."])
    ids = tokenizer("。", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert not set(ids) & set(sentence_boundary_ids(tokenizer))
    assert texts(tokenizer, sentence_boundary_ids(tokenizer)) == ["!", ".", "?"]


def test_sentencepiece_with_byte_fallback():
    items = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x2E>", "<0x80>", "▁", "▁.", ".", '."', "▁word", ".▁▁", "。", "▁3.14"]
    tokenizer = Tokenizer(
        models.BPE({item: i for i, item in enumerate(items)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found = [items[i] for i in sentence_boundary_ids(tokenizer)]
    assert found == ["<0x2E>", "▁.", ".", '."', ".▁▁", "。"]


def test_wordpiece():
    items = ["[UNK]", "[SEP]", ".", "##.", "?", "##?!", "word", "##ing", "。", ","]
    tokenizer = Tokenizer(models.WordPiece({item: i for i, item in enumerate(items)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")
    assert [items[i] for i in sentence_boundary_ids(tokenizer)] == [".", "##.", "?", "##?!", "。"]


def test_tokenizer_without_the_rust_library():
    tokenizer = PythonTokenizer(["word", ".", '?"', "\n\n", "3.14"], unk_token="<unk>", eos_token="<stop.>")
    assert sentence_boundary_ids(tokenizer) == [1, 2, 3]


def test_backend_without_added_tokens():
    class Bare(PythonTokenizer):
        added_tokens_decoder = property(lambda self: self._refuse(), lambda self, value: None)

        def get_vocab(self):
            return {item: i for i, item in enumerate(self.items)}

        def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
            return [self.items[i] for i in ids]

        def _refuse(self):
            raise NotImplementedError

    assert sentence_boundary_ids(Bare(["word", ".", '?"'])) == [1, 2]


def test_added_tokens_count_and_special_tokens_do_not():
    tokenizer = byte_level(["."])
    plain, size = sentence_boundary_ids(tokenizer), len(tokenizer)
    # The last one: `»` stands for a raw byte inside a byte-level vocabulary, but not inside an added token.
    tokenizer.add_tokens(["\n\n", "<word>", "<done>.", "Fin.»"])
    tokenizer.add_tokens([AddedToken("<halt!>", special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "The end."})
    assert sentence_boundary_ids(tokenizer) == [*plain, size, size + 2, size + 3]


def test_ids_are_those_of_the_vocabulary_even_with_gaps():
    vocab = {"word": 0, ".": 70, "?": 7, "!": 35}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="word")))
    assert sentence_boundary_ids(tokenizer) == [7, 35, 70]
    assert resolve_boundaries(tokenizer, [70], 71).tolist() == [70]


def test_neither_source_gives_none():
    assert resolve_boundaries(None, None, 10) is None


def test_tokenizer_gives_all_its_marks():
    found = resolve_boundaries(word_level(["word", "?", "x", "."]), None, 4)
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 3]


@pytest.mark.parametrize(
    "given",
    [
        [5, 2, 5, 0],
        (5, 2, 0),
        {0, 5, 2},
        torch.tensor([5, 2, 0], dtype=torch.int32),
        np.array([5, 2, 0]),
        [np.int64(5), 2, 0],
    ],
    ids=["list", "tuple", "set", "tensor", "array", "numpy-items"],
)
def test_explicit_ids_are_sorted_and_distinct(given):
    found = resolve_boundaries(None, given, 6)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2, 5]


def test_explicit_ids_may_be_a_part_of_the_tokenizers_marks():
    tokenizer = word_level(["word", "?", "x", ".", "!"])
    assert resolve_boundaries(tokenizer, [4, 1], 8).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"boundary_ids=\[\] must hold at least one token id; give the ids"),
        (torch.tensor([], dtype=torch.int64), r"boundary_ids=\[\] must hold at least one"),
        ([3, -1], r"must lie between 0 and 9, the ids of the model, but hold -1; give"),
        ([10, 3, 11], r"must lie between 0 and 9, the ids of the model, but hold 10, 11; give"),
        (range(8, 20), r"but hold 10, 11, 12, 13, 14 and 5 more; give"),
        ([2**70], "must lie between 0 and 9"),
        ([3, "."], r"must hold whole numbers only, but holds '\.'; give"),
        ([3, 4.0], r"must hold whole numbers only, but holds 4\.0"),
        ([3, True], "must hold whole numbers only, but holds True"),
        ([3, None], "must hold whole numbers only, but holds None"),
        (torch.tensor([[3]]), r"must hold whole numbers only, but holds \[3\]"),
        (torch.tensor([1.0]), r"must hold whole numbers only, but holds 1\.0"),
        (".!?", r"boundary_ids='\.!\?' must be a list of token ids; give"),
        (3, "boundary_ids=3 must be a list of token ids"),
        (torch.tensor(3), "boundary_ids=3 must be a list of token ids"),
    ],
    ids=str,
)
def test_bad_explicit_ids(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve_boundaries(None, given, 10)


def test_explicit_ids_that_the_tokenizer_does_not_know_as_marks():
    tokenizer = word_level(["word", "?", ",", ".", "The end."], eos_token="The end.")
    with pytest.raises(
        ConfigError, match=r"these are not: 2 \(','\), 4 \('The end\.'\), 7 \(not in the tokenizer\); "
    ):
        resolve_boundaries(tokenizer, [1, 2, 3, 4, 7], 8)
    assert resolve_boundaries(None, [1, 2, 3, 4, 7], 8).tolist() == [1, 2, 3, 4, 7]


def test_only_the_first_offending_ids_are_named():
    with pytest.raises(ConfigError, match=r"not: 1 \('w1'\), .*, 5 \('w5'\) and 4 more; leave them out, give"):
        resolve_boundaries(word_level([".", *(f"w{i}" for i in range(1, 10))]), range(10), 10)


def test_marks_beyond_the_model_vocabulary():
    with pytest.raises(ConfigError, match=r"beyond the 3 ids of the model: 3 \('\?'\); use the model's own tokenizer"):
        resolve_boundaries(word_level(["word", ".", "x", "?"]), None, 3)


def test_vocabulary_without_any_mark():
    with pytest.raises(ConfigError, match=r"none of its 3 does; give boundary_ids instead\."):
        sentence_boundary_ids(word_level(["word", ",", "3.14"]))


@pytest.mark.parametrize("thing", [None, "gpt2", 3, {".": 0}, Tokenizer(models.WordLevel({".": 0}, unk_token="."))])
def test_not_a_tokenizer(thing):
    with pytest.raises(ConfigError, match=r"must be a tokenizer of transformers; load one with AutoTokenizer"):
        sentence_boundary_ids(thing)
    if thing is not None:
        with pytest.raises(ConfigError, match=r"must be a tokenizer of transformers"):
            resolve_boundaries(thing, [0], 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_is_boundary_marks_every_place(dtype):
    ids = torch.tensor([[4, 1, 0, 3], [3, 3, 4, 2]], dtype=dtype)
    found = is_boundary(ids, torch.tensor([1, 3]))
    assert found.dtype == torch.bool
    assert found.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert is_boundary(ids[:, :1], torch.tensor([1, 3])).tolist() == [[False], [True]]
    assert is_boundary(ids[:, :0], torch.tensor([1, 3])).shape == (2, 0)


def test_is_boundary_with_more_marks_than_tokens():
    marks, ids = torch.arange(0, 2000, 2), torch.arange(40).view(2, 20)
    assert is_boundary(ids, marks).tolist() == (ids % 2 == 0).tolist()


def obvious(text):
    """The rule, one character after the other."""
    lines = text.replace("\r", "").split("\n")
    if any(not line.strip() for line in lines[1:-1]):
        return True
    while text and (text[-1].isspace() or text[-1] in "\"')]}’”‘“»›«‹」』）］｝】》〉〕〗〙〛｣｠〞〟＂＇"):
        text = text[:-1]
    return text.endswith(tuple(".!?…。！？｡．؟۔।॥"))


@pytest.mark.real
def test_smollm2_marks_equal_an_obvious_version(smollm2):
    _, tokenizer = smollm2
    special = set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    expected = [i for i in range(len(tokenizer)) if i not in special and obvious(tokenizer.decode([i]))]
    assert sentence_boundary_ids(tokenizer) == expected
    assert resolve_boundaries(tokenizer, None, len(tokenizer)).tolist() == expected


@pytest.mark.real
def test_smollm2_cuts_text_into_its_sentences(smollm2):
    _, tokenizer = smollm2
    pieces = [
        'She asked: "Is it done?"',
        ' "Not yet," he said.',
        " (It took years.)",
        " Then...",
        " silence!",
        # This tokenizer writes a blank line in front of a word as two newlines, and one in front of a blank as one id.
        "\n\nA heading\n\n ",
        " and a part without an end",
    ]
    ids = tokenizer("".join(pieces), return_tensors="pt")["input_ids"]
    ends = is_boundary(ids, resolve_boundaries(tokenizer, None, len(tokenizer)))[0]
    found, start = [], 0
    for end in [*(ends.nonzero().flatten() + 1).tolist(), ids.shape[1]]:
        found.append(tokenizer.decode(ids[0, start:end]))
        start = end
    assert found == pieces


@pytest.mark.real
def test_smollm2_end_of_text_is_no_mark(smollm2):
    _, tokenizer = smollm2
    with pytest.raises(ConfigError, match=rf"not: {tokenizer.eos_token_id} \('<\|im_end\|>'\)"):
        resolve_boundaries(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
