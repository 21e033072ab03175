"""Where stored tokens wait (`store.py`), and where their sentences end (`sentence_map.py`)."""

import copy
import errno
import os
import signal

import pytest
import torch

from hf_ext import CacheStateError, ConfigError
from hf_ext.cache_impls.sentence_map import BLOCK, SentenceMap
from hf_ext.cache_impls.store import CHUNK, OffloadedRows
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, text_tensors
from tests.cache_impls.retrieval_helpers import TIGHT, RetrievalDriver, make, model_of, stored_tokens


CPU = torch.device("cpu")
PLACES = ["memory", "file"]
KINDS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=PLACES)
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "file" else None


def rows_of(length, dtype=torch.float32, batch=2, seed=0):
    return torch.randn(batch, 3, length, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_places(length, count=17, batch=2, seed=1):
    return torch.randint(length, (batch, 3, count), generator=torch.Generator().manual_seed(seed))


def picked(rows, places):
    return rows.gather(2, places[..., None].expand(-1, -1, -1, rows.shape[3]))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("pieces", [[1], [31, 1], [CHUNK, CHUNK], [5, 60, 1, 1, 200], [100] * 6, [1] * 70])
def test_rows_come_back_as_they_were_appended(folder, dtype, pieces):
    rows = rows_of(sum(pieces), dtype)
    stored, start = OffloadedRows(rows[:, :, : pieces[0]], folder), pieces[0]
    for size in pieces[1:]:
        stored.append(rows[:, :, start : start + size])
        start += size
        assert torch.equal(stored.rows(), rows[:, :, :start])
    assert stored.length == start
    assert torch.equal(stored.rows(), rows)
    places = some_places(start)
    assert torch.equal(stored.gather(places), picked(rows, places))
    assert stored.rows().dtype == stored.gather(places).dtype == dtype
    assert stored.row_bytes == 2 * 3 * 8 * dtype.itemsize
    if folder is not None:
        assert os.listdir(folder) == []


def test_no_rows_at_all(folder):
    stored = OffloadedRows(rows_of(0), folder)
    assert stored.rows().shape == (2, 3, 0, 8)
    stored.append(rows_of(0))
    stored.append(rows_of(40))
    assert torch.equal(stored.rows(), rows_of(40))


def test_gathering_nothing(folder):
    stored = OffloadedRows(rows_of(40), folder)
    assert stored.gather(some_places(40, count=0)).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("index", [[0, 1], [1, 0], [1, 1, 0], [1]])
def test_stored_rows_follow_the_batch_and_can_grow_after_it(folder, dtype, index):
    rows, index = rows_of(150, dtype), torch.tensor(index)
    stored = OffloadedRows(rows[:, :, :90], folder)
    stored.reorder(index)
    assert torch.equal(stored.rows(), rows[index][:, :, :90])
    stored.append(rows[index][:, :, 90:])
    assert torch.equal(stored.rows(), rows[index])
    places = some_places(150, batch=len(index))
    assert torch.equal(stored.gather(places), picked(rows[index], places))


def test_a_copy_of_stored_rows_is_independent(folder):
    rows = rows_of(200)
    stored = OffloadedRows(rows[:, :, :70], folder)
    other = copy.deepcopy(stored)
    stored.append(rows[:, :, 70:170])
    other.append(-rows[:, :, 70:200])
    assert torch.equal(stored.rows(), rows[:, :, :170])
    assert torch.equal(other.rows(), torch.cat([rows[:, :, :70], -rows[:, :, 70:]], dim=2))


def test_storage_grows_by_little_more_than_what_is_kept(folder):
    stored = OffloadedRows(rows_of(1), folder)
    for _ in range(40):
        stored.append(rows_of(37))
        held = len(stored.data) * CHUNK
        assert stored.length <= held <= 1.2 * stored.length + 2 * CHUNK


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_a_file_is_closed_when_its_rows_are_gone(tmp_path):
    def held():
        found = []
        for number in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue
        return [name for name in found if name.startswith(str(tmp_path))]

    stored = OffloadedRows(rows_of(100), str(tmp_path))
    assert len(held()) >= 1
    stored.reorder(torch.tensor([1, 0]))
    stored.append(rows_of(300))
    assert len(held()) <= 2, "an old file was left open"
    del stored
    assert held() == []


def missing(tmp_path):
    return str(tmp_path / "missing")


def a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    return str(tmp_path / "file")


def unwritable(tmp_path):
    if os.geteuid() == 0:
        # root may write anywhere but here
        return "/proc/self"
    (tmp_path / "locked").mkdir(mode=0o500)
    return str(tmp_path / "locked")


@pytest.mark.parametrize("bad", [missing, a_file, unwritable], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["sentencekv", "hybridkv"])
def test_a_folder_that_cannot_be_written_to_is_refused_and_named(name, bad, tmp_path):
    path = bad(tmp_path)
    for attempt in (lambda: OffloadedRows(rows_of(3), path), lambda: make(name, model_of("llama"), offload_dir=path)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert repr(path) in str(caught.value)
        assert "existing folder that can be written to" in str(caught.value)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["sentencekv", "hybridkv"])
def test_a_full_disk_is_a_typed_error_and_nothing_stays_in_the_folder(name, tmp_path, monkeypatch):
    model, inputs = model_of("llama"), prompts(length=150, pad=0)
    cache = make(name, model, **TIGHT, offload_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(CacheStateError, match=r"cannot hold [\d,]+ bytes .*disk is full.*reset\(\)") as caught:
            generate(model, cache, inputs)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert model.config._attn_implementation == "sdpa"
    cache.reset()
    expected = generate(model, make(name, model, **TIGHT), inputs)
    assert generate(model, cache, inputs).tolist() == expected.tolist()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["sentencekv", "hybridkv"])
@torch.no_grad()
def test_a_disk_that_fills_later_does_not_lead_to_silent_loss(name, after, tmp_path, monkeypatch):
    """Of two layers' keys and values the one numbered `after` no longer fits: until `reset()` the cache refuses."""
    model, inputs = model_of("llama"), prompts(length=150, pad=0)
    cache = make(name, model, **TIGHT, offload_dir=str(tmp_path))
    model(**inputs, past_key_values=cache)
    calls, reserve = [], os.posix_fallocate

    def fill_up(*args):
        calls.append(args)
        if len(calls) > after:
            no_space()
        reserve(*args)

    token = torch.full((2, 1), 5)
    monkeypatch.setattr(os, "posix_fallocate", fill_up)

    def go_on(steps):
        for _ in range(steps):
            model(input_ids=token, past_key_values=cache)

    with pytest.raises(CacheStateError, match="disk is full"):
        go_on(300)
    with pytest.raises(CacheStateError, match=r"reset\(\)"):
        go_on(1)


@pytest.mark.parametrize("name", ["sentencekv", "hybridkv"])
def test_a_file_has_no_name_while_it_is_in_use(name, tmp_path):
    driver = RetrievalDriver(name, offload_dir=str(tmp_path), **TIGHT)
    driver.feed_text(text_tensors(2, 2, 2, 200, 16), 150)
    assert isinstance(driver.layer.stores[0], OffloadedRows)
    assert os.listdir(tmp_path) == []
    assert driver.cache.offloaded_bytes() == 2 * driver.layer.stored * driver.layer.stores[0].row_bytes > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_process_leaves_nothing_behind(tmp_path):
    model = tiny_model("llama")
    cache = make("sentencekv", model, token_budget=96, offload_dir=str(tmp_path))

    def kill(*_):
        if cache.get_seq_length() == 305 and cache.offloaded_bytes() > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.layers[1].register_forward_pre_hook(kill)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            generate(model, cache, prompts(rows=1, length=300, pad=0), max_new_tokens=40)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "generation ended before anything was stored"
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert os.listdir(tmp_path) == []


# Sentences.


def obvious_ends(marks, longest):
    """Ends of one row's sentences, one token after the other."""
    ends, open_tokens = [], 0
    for mark in marks:
        open_tokens += 1
        ends.append(mark or open_tokens == longest)
        if ends[-1]:
            open_tokens = 0
    return ends


MARKS = torch.tensor([5, 9, 77])


def random_ids(length, seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (batch, length), generator=generator)
    return torch.where(torch.rand(batch, length, generator=generator) < 0.04, MARKS[seed % 3], ids)


def mapped(ids, sizes, longest=16, boundary_ids=MARKS, real=None):
    sentences, start = SentenceMap(boundary_ids, longest), 0
    for size in sizes:
        part = slice(start, start + size)
        sentences.extend(size, ids.shape[0], CPU, ids[:, part], None if real is None else real[:, part])
        start += size
    return sentences


def splits(length, seed):
    generator, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < length:
        sizes.append(min(int(torch.randint(1, 12, (), generator=generator)) ** 2, length - sum(sizes)))
    return sizes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("longest", [1, 16, 128])
def test_sentences_in_blocks_are_those_of_an_obvious_version(seed, longest):
    ids = random_ids(200, seed)
    expected = [obvious_ends(row, longest) for row in torch.isin(ids, MARKS).tolist()]
    assert mapped(ids, [200], longest).ends.tolist() == expected
    assert mapped(ids, splits(200, seed), longest).ends.tolist() == expected
    assert mapped(ids, [1] * 200, longest).ends.tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_in_one_sentence_and_a_mark_in_the_one_it_ends(seed):
    ids, longest = random_ids(200, seed), 16
    sentences = mapped(ids, splits(200, seed), longest)
    numbers = sentences.numbers()
    assert numbers.shape == ids.shape
    for row, (own, marked) in enumerate(zip(numbers.tolist(), torch.isin(ids, MARKS).tolist())):
        assert own[0] == 0
        assert all(after - before in (0, 1) for before, after in zip(own, own[1:])), "a partition in order"
        for place in range(199):
            if marked[place]:
                assert own[place + 1] == own[place] + 1, "the next token begins another sentence"
            if own[place + 1] > own[place]:
                assert sentences.ends[row, place]
        assert max(own.count(number) for number in set(own)) <= longest
    assert torch.equal(sentences.numbers(50), numbers[:, 50:])


@pytest.mark.parametrize("seed", range(4))
def test_the_open_length_is_what_has_not_ended(seed):
    ids = random_ids(150, seed)
    sentences = mapped(ids, [0], longest=16)
    assert sentences.open_length(3, CPU).tolist() == [0, 0, 0]
    for place in range(150):
        sentences.extend(1, 3, CPU, ids[:, place : place + 1], None)
        for row, ends in enumerate(sentences.ends.tolist()):
            expected = ends[::-1].index(True) if True in ends else len(ends)
            assert int(sentences.open_length(3, CPU)[row]) == expected < 16


@pytest.mark.parametrize("cut", [0, 1, 37, 64, 99, 100])
def test_after_a_crop_sentences_go_on_as_if_nothing_had_been_there(cut):
    ids, other = random_ids(100, 0), random_ids(90, 1)
    sentences = mapped(ids, [60, 40])
    sentences.crop(cut)
    assert sentences.length == cut
    sentences.extend(90, 3, CPU, other, None)
    expected = mapped(torch.cat([ids[:, :cut], other], dim=1), [cut + 90])
    assert torch.equal(sentences.ends, expected.ends)


@pytest.mark.parametrize("index", [[2, 0, 0], [1], [0, 1, 2, 2]])
def test_sentences_follow_the_batch(index):
    ids, other, index = random_ids(70, 0), random_ids(60, 1), torch.tensor(index)
    sentences = mapped(ids, [70])
    sentences.reorder(index)
    sentences.extend(60, len(index), CPU, other[index], None)
    assert torch.equal(sentences.ends, mapped(torch.cat([ids, other], dim=1)[index], [130]).ends)


@pytest.mark.parametrize("pads", [(0, 1, 40), (3, 16, 17)])
def test_padding_does_not_shift_the_sentences_of_a_row(pads):
    ids = random_ids(100, 0)
    real = torch.arange(100) >= torch.tensor(pads)[:, None]
    ids = ids.masked_fill(~real, int(MARKS[0]) if pads[0] else 3)
    for sizes in ([100], splits(100, 3)):
        sentences = mapped(ids, sizes, real=real)
        for row, pad in enumerate(pads):
            alone = mapped(ids[row : row + 1, pad:], [100 - pad])
            assert torch.equal(sentences.ends[row, pad:], alone.ends[0])
            own = sentences.numbers()[row].tolist()
            assert not set(own[:pad]) & set(own[pad:]), "a sentence holds padding"


@pytest.mark.parametrize("known", ["no marks", "no ids"])
@pytest.mark.parametrize("sizes", [[100], [1] * 100, [10, 45, 45]])
def test_without_marks_sentences_are_blocks(known, sizes):
    sentences = SentenceMap(None if known == "no marks" else MARKS, 128)
    for size in sizes:
        ids = torch.full((2, size), 5) if known == "no marks" else None
        sentences.extend(size, 2, CPU, ids, None)
    assert (sentences.ends.nonzero()[:, 1].view(2, -1) + 1).tolist() == [[BLOCK, 2 * BLOCK, 3 * BLOCK]] * 2
    assert sentences.open_length(2, CPU).tolist() == [100 % BLOCK] * 2


@pytest.mark.parametrize("before", [0, 7, 40, 100])
def test_a_stretch_without_ids_keeps_to_the_limit(before):
    sentences = SentenceMap(MARKS, 128)
    for size, ids in ((before, torch.full((1, before), 1)), (90, None), (200, torch.full((1, 200), 1))):
        sentences.extend(size, 1, CPU, ids, None)
    own = sentences.numbers()[0].tolist()
    assert max(own.count(number) for number in set(own)) <= 128
    inside = own[before + BLOCK : before + 90]
    assert max(inside.count(number) for number in set(inside)) <= BLOCK


def test_a_reset_map_starts_again():
    ids = random_ids(50, 0)
    sentences = mapped(ids, [50])
    sentences.reset()
    assert sentences.length == 0
    sentences.extend(50, 3, CPU, ids, None)
    assert torch.equal(sentences.ends, mapped(ids, [50]).ends)


def test_stored_rows_of_a_model_without_an_accelerator_stay_where_they_are():
    model = model_of("llama")
    cache = make("sentencekv", model, **TIGHT)
    generate(model, cache, prompts(length=150))
    assert stored_tokens(cache) > 0
    assert cache.offloaded_bytes() == 0
