"""The subcommands for deltas, on tiny models in folders and a Hub on this machine."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ext.artifact import read_artifact
from hf_ext.cli import main
from hf_ext.cli_delta import parse_size, read_examples
from hf_ext.errors import ConfigError
from hf_ext.hub_tools import push
from hf_ext.merging.osd_artifact import OSDArtifact
from hf_ext.tiny import VOCAB_SIZE, tiny_model
from tests.hub_server import hub  # noqa: F401
from tests.merging.helpers import save, tuned_model


BUDGET = 12_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("delta")
    return save(tiny_model("llama"), root / "base"), save(tuned_model("llama"), root / "tuned")


@pytest.fixture(scope="module")
def compressed(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("delta") / "out"
    assert main(["compress", *map(str, folders), str(out), "--budget", "12KB"]) == 0
    return out


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("250KB", 250_000),
        ("250 kb", 250_000),
        ("1MB", 1_000_000),
        ("1MiB", 1_048_576),
        ("2gib", 2 * 1024**3),
        ("1.5KB", 1500),
        ("250000", 250_000),
        ("7B", 7),
    ],
)
def test_a_size_is_read_as_people_write_it(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "KB", "-1KB", "1XB", "1 2KB", "0", "0.4", "1e6", "nan", "KiB 3", "٣KB"])
def test_what_is_not_a_size_is_refused_and_shown(text):
    with pytest.raises(ConfigError, match="is not a size; write 250KB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_compress_keeps_the_budget_and_says_what_it_did(folders, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    code, said, _ = run(capsys, "compress", *folders, out, "--budget", "12KB")
    assert code == 0
    assert 0.8 * BUDGET < size_of(out) <= BUDGET
    said = " ".join(said.split())
    assert f"bytes before {sum(weight.nbytes for weight in tiny_model('llama').parameters()):,} bytes" in said
    assert f"bytes after {size_of(out):,} bytes" in said
    assert "relative error, q_proj" in said
    settings = read_artifact(out).config
    assert said.startswith(f"form {settings['form']} other tensors {settings['other tensors']} bytes before")
    assert "recovery" not in said


def test_compress_with_calibration_measures_recovery(folders, tmp_path, capsys):
    file = tmp_path / "examples.jsonl"
    rows = [{"input_ids": torch.randint(2, VOCAB_SIZE, (24,)).tolist()} for _ in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    code, said, _ = run(
        capsys, "compress", *folders, tmp_path / "out", "--budget", "40KB", "--codec", "factors", "--calibration", file
    )
    assert code == 0
    assert 0 < OSDArtifact.from_pretrained(tmp_path / "out").recovery <= 1
    assert "recovery of predictions" in said


def test_compress_hands_its_settings_on(folders, tmp_path, capsys):
    flags = ["--rank", 1, "--codec", "factors", "--values", "int4", "--seed", 7, "--lora", 2]
    code, said, _ = run(capsys, "compress", *folders, tmp_path / "out", *flags)
    assert code == 0
    config = OSDArtifact.from_pretrained(tmp_path / "out").config
    assert (config.rank, config.budget, config.codec, config.values, config.seed) == (1, None, "factors", "int4", 7)
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert "a plain LoRA of rank 2" in said


def test_compress_in_the_papers_form(folders, tmp_path, capsys):
    assert run(capsys, "compress", *folders, tmp_path / "out", "--mode", "paper", "--rank", 1)[0] == 0
    assert read_artifact(tmp_path / "out").config["mode"] == "paper"


def test_inspect_has_a_line_per_tensor_and_the_sums(compressed, capsys):
    code, said, _ = run(capsys, "inspect", compressed)
    assert code == 0
    artifact = OSDArtifact.from_pretrained(compressed)
    for line in artifact.table():
        shown = next(text for text in said.splitlines() if text.startswith(line["tensor"] + " "))
        assert line["shape"] in shown
        assert f"{line['bytes']:,}" in shown
        assert f"{line['error']:.3f}" in shown
    total = sum(line["bytes"] for line in artifact.table())
    expected = (
        f"{len(artifact.deltas)} tensors, {total:,} bytes; with headers and settings {size_of(compressed):,} bytes"
    )
    assert expected in said
    assert "base: " in said


def test_restore_writes_the_base_plus_what_was_kept(folders, compressed, tmp_path, capsys):
    code, said, _ = run(capsys, "restore", compressed, "--to", tmp_path / "plain")
    assert code == 0
    assert f"{size_of(tmp_path / 'plain'):,} bytes" in said
    restored = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").named_parameters())
    deltas = OSDArtifact.from_pretrained(compressed).deltas
    assert deltas
    for name, weight in tiny_model("llama").named_parameters():
        change = torch.from_numpy(deltas[name].dense()) if name in deltas else 0.0
        torch.testing.assert_close(restored[name], weight + change, atol=1e-6, rtol=0)


def test_restore_on_another_base_is_refused_unless_forced(compressed, tmp_path, capsys):
    other = save(tiny_model("llama", seed=5), tmp_path / "other")
    arguments = ["restore", compressed, "--to", tmp_path / "plain", "--base", other]
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert "not the base" in error
    assert run(capsys, *arguments, "--force")[0] == 0


def test_a_dry_run_lists_files_and_card_and_sends_nothing(compressed, capsys):
    code, said, _ = run(capsys, "push", compressed, "user/delta", "--dry-run")
    assert code == 0
    for path in compressed.iterdir():
        assert f"{path.name:32s} {path.stat().st_size:>12,} bytes" in said
    assert "library_name: peft" in said
    assert said.rstrip().endswith("Nothing was sent.")


@pytest.fixture
def local_hub(hub, monkeypatch):  # noqa: F811
    made = push.hub_api
    monkeypatch.setattr(push, "hub_api", lambda token, endpoint: made(hub.token, hub.endpoint))
    return hub


def test_what_was_pushed_is_pulled_byte_by_byte(local_hub, compressed, tmp_path, capsys):
    code, said, _ = run(capsys, "push", compressed, "user/delta", "--private", "--no-snippet", "--message", "First")
    assert code == 0
    assert "pushed: " in said
    code, said, _ = run(capsys, "pull", "user/delta", tmp_path / "pulled")
    assert code == 0
    assert str(tmp_path / "pulled") in said
    for path in compressed.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    code, _, error = run(capsys, "pull", "user/delta", tmp_path / "pulled")
    assert code == 2
    assert "exists already" in error
    assert run(capsys, "pull", "user/delta", tmp_path / "pulled", "--force")[0] == 0


def test_flags_of_push_and_pull_arrive(monkeypatch, compressed, capsys):
    calls = []
    report = push.push_artifact(compressed, "user/delta", dry_run=True)
    monkeypatch.setattr(push, "push_artifact", lambda *given, **named: calls.append((given, named)) or report)
    monkeypatch.setattr(push, "pull_artifact", lambda *given, **named: calls.append((given, named)) or "there")
    main(["push", "out", "user/delta", "--revision", "next", "--endpoint", "file:///hub"])
    main(["pull", "user/delta", "there", "--revision", "v1", "--force", "--endpoint", "file:///hub"])
    settings = {"private": None, "revision": "next", "commit_message": None, "dry_run": False, "run_snippet": True}
    assert calls[0] == (("out", "user/delta"), {**settings, "endpoint": "file:///hub"})
    assert calls[1] == (("user/delta", "there"), {"revision": "v1", "force": True, "endpoint": "file:///hub"})


def test_a_folder_takes_the_place_of_the_hub(compressed, tmp_path, capsys):
    (tmp_path / "hub").mkdir()
    where = ["--endpoint", (tmp_path / "hub").as_uri()]
    code, said, _ = run(capsys, "push", compressed, "user/delta", "--no-snippet", *where)
    assert code == 0
    assert f"pushed: {(tmp_path / 'hub' / 'user' / 'delta').as_uri()}" in said
    assert run(capsys, "pull", "user/delta", tmp_path / "pulled", *where)[0] == 0
    for path in compressed.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    code, _, error = run(capsys, "pull", "user/delta", tmp_path / "other", "--revision", "v1", *where)
    assert code == 2
    assert "a folder has no revisions" in error


def test_examples_are_lines_of_text_or_of_json(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\ntwo \n")
    assert read_examples(text) == ["one", "two "]
    rows.write_text('{"text": "one"}\n\n{"input_ids": [1, 2], "labels": [-100, 2], "id": 9}\n')
    assert read_examples(rows) == ["one", {"input_ids": [1, 2], "labels": [-100, 2]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "give a .txt or a .jsonl file"),
        ("a.txt", "\n \n", "is empty"),
        ("a.txt", None, "cannot be read"),
        ("a.jsonl", '{"text": "one"}\n{', "line 2 is not JSON"),
        ("a.jsonl", '\n{"title": "one"}', "line 2 has neither"),
        ("a.jsonl", '["text"]', "line 1 has neither"),
    ],
)
def test_a_file_without_examples_is_refused_before_anything_is_read(tmp_path, capsys, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    code, _, error = run(capsys, "compress", "no/base", "no/tuned", tmp_path / "out", "--calibration", file)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "much"], "'much' is not a size"),
        (["--codec", "zip"], "OSDConfig.codec='zip' must be one of"),
        (["--values", "int9"], "OSDConfig.values='int9' must be one of"),
        (["--mode", "paper"], "OSDConfig.rank=None must be given"),
        (["--rank", "0"], "OSDConfig.rank=0 must be at least 1"),
        (["--lora", "0"], "--lora 0 must be at least 1"),
        (["--budget", "10"], "does not hold a single entry"),
        (["--seed", "-1"], "OSDConfig.seed=-1"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_no_folder(folders, tmp_path, capsys, flags, message):
    code, _, error = run(capsys, "compress", *folders, tmp_path / "out", *flags)
    assert code == 2
    assert message in error
    assert error.startswith("hf-ext: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(folders, compressed, capsys):
    before = {path.name: path.read_bytes() for path in compressed.iterdir()}
    code, _, error = run(capsys, "compress", *folders, compressed)
    assert code == 2
    assert "not an empty folder" in error
    assert {path.name: path.read_bytes() for path in compressed.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "{missing}", "{missing}", "out"],
        ["inspect", "{missing}"],
        ["restore", "{missing}", "--to", "out"],
        ["push", "{missing}", "user/x", "--dry-run"],
        ["push", "{missing}", "not/an/id", "--dry-run"],
        ["pull", "not/an/id", "out"],
    ],
)
def test_what_is_not_there_is_named(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    missing = str(tmp_path / "missing")
    code, _, error = run(capsys, *[argument.format(missing=missing) for argument in arguments])
    assert code == 2
    assert missing in error or "not/an/id" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "a", "b"],
        ["compress", "a", "b", "c", "--budget", "1MB", "--rank", "2"],
        ["compress", "a", "b", "c", "--rank", "two"],
        ["restore", "a"],
        ["push", "a"],
        ["pull", "a"],
        ["inspect"],
    ],
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["compress", "a", "b", "out"], ["inspect", "a"], ["restore", "a", "--to", "b"]])
def test_without_peft_the_command_says_how_to_get_it(monkeypatch, tmp_path, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert "pip install 'hf-ext[peft]'" in error
