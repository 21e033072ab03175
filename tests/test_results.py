"""The measured tables in the README and the docs are those of the committed results; tables and plots are made right."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import make_plots, make_tables
from hf_ext.table import Row, write_rows


def rows_of_kv_quality():
    rows = []
    for setting, system, loss, share in (
        ("BBC, all contexts", "dense", 0.0, 1.0),
        ("BBC, all contexts", "int8 per token", -0.001, 0.516),
        ("BBC, all contexts, ratio 0.6", "ojakv", 0.02, 0.598),
        ("BBC, all contexts, ratio 0.6", "ojakv pre-rope", 0.01, 0.598),
        ("BBC, all contexts, ratio 0.6", "snapkv", 0.026, 0.6),
        ("BBC, all contexts, ratio 0.6", "greedy", -0.5, 0.7),
        ("BBC, 1024 tokens, ratio 0.6", "ojakv", 0.04, 0.598),
        ("needles, question later", "int8 per token", 0.55, 0.516),
        ("needles, question later, ratio 0.6", "ojakv", 0.9, 0.598),
        ("BBC, all contexts, ratio 0.4", "ojakv", 0.05, 0.398),
        ("needles, question later, ratio 0.4", "ojakv", 2.9, 0.398),
    ):
        metric = "loss above dense" if setting.startswith("BBC") else "loss of the code"
        rows.append(Row("ojakv", system, setting, metric, loss, "nats", 24, 0.01))
        rows.append(Row("ojakv", system, setting, "bytes", share, "of dense", 24))
    return rows


def rows_of_decode_speed():
    rows = []
    for kind, factor in (("32K, float32", 1), ("32K, bfloat16", 2)):
        setting = f"a layer, {kind}, 1 thread"
        for method, system, value in (
            ("packed", "DynamicCache", 1.0),
            ("packed", "StaticCache", 4.0 * factor),
            ("packed", "packed", 4.5 * factor),
            ("ojakv", "ojakv 0.6", 6.0 * factor),
            ("sentencekv", "sentencekv", 9.0 * factor),
            ("hybridkv", "hybridkv", 7.0 * factor),
        ):
            rows.append(Row(method, system, setting, "speed over DynamicCache", value, "x", 24, 0.1))
            rows.append(Row(method, system, setting, "decode step", 10 / value, "ms", 24, 0.1))
    return rows


def rows_of_retrieval_quality():
    rows = []
    for setting, unit in (
        ("BBC, 4096 tokens, budget 512", "loss above dense"),
        ("needles, question later, budget 256", "loss of the code"),
    ):
        for method, system, value, share in (
            ("sentencekv", "dense", 0.0, 1.0),
            ("sentencekv", "oracle top tokens", 0.001, 1.0),
            ("sentencekv", "quest", 0.03, 1.12),
            ("sentencekv", "sentencekv paper", 0.02, 0.56),
            ("sentencekv", "sentencekv", 0.01, 1.2),
            ("sentencekv", "sentencekv page_bound", 0.015, 1.1),
            ("hybridkv", "hybridkv", 0.005, 1.3),
        ):
            rows.append(Row(method, system, setting, unit, value, "nats", 4, 0.001))
            rows.append(Row(method, system, setting, "bytes", share, "of dense", 4))
    return rows


def rows_of_delta_quality(what, budgets):
    rows = []
    for budget in budgets:
        for system, value in (
            ("exact block deltas", 0.999),
            ("dense SVD int3", 0.8),
            ("seeded mask + sign", 0.97),
            ("osd", 0.99),
            ("osd, paper mode", 0.1),
        ):
            rows.append(Row("osd", system, f"{what}, {budget} kB", "recovery", value, "", 3, 0.01))
    return rows


def rows_of_optimizers(setting):
    """What was published counts as a peer, what is a form of ours does not."""
    systems = {"sgc": 4.0, "sgc, hybrid": 3.9, "sgc, paper known": 4.4, "AdamW": 4.1}
    return [Row("sgc", system, setting, "held-out loss", loss, "nats", 3, 0.01) for system, loss in systems.items()]


def rows_of_detectors(method, file_settings, metrics):
    """Ours, its published form, which is a peer, and what knows the answer, which is none."""
    systems = {method: 0.9, f"{method} paper": 0.8, f"{method} conditional": 0.85, "oracle": 1.0}
    return [
        Row(method, system, setting, metric, value, "", 5, 0.01)
        for setting in file_settings
        for metric in metrics
        for system, value in systems.items()
    ]


@pytest.fixture
def results():
    return {
        "anomaly_quality": rows_of_detectors("tccm", ["20 tables, fitted"], ["mean AUROC", "mean AUPR"]),
        "anomaly_explain": rows_of_detectors("tccm", ["mean of 3 kinds"], ["top-m Jaccard"]),
        "ood_quality": rows_of_detectors(
            "medix", ["SVHN, prevalence 0.1", "MiniLM features, prevalence 0.3"], ["auroc"]
        ),
        "kv_quality": rows_of_kv_quality(),
        "decode_speed": rows_of_decode_speed(),
        "retrieval_quality": rows_of_retrieval_quality(),
        "delta_quality_headlines": rows_of_delta_quality("SmolLM2 headlines", (50, 250)),
        "delta_quality_topics": rows_of_delta_quality("SmolLM2 topics", (50,)),
        "delta_quality_small": rows_of_delta_quality("small model", (24,)),
        "optimizer_quality_scratch_1m": rows_of_optimizers("scratch, 1m, 9 steps"),
        "optimizer_quality_finetune_1m": rows_of_optimizers("finetune, 1m, 9 steps"),
    }


def test_an_optimizers_peer_may_keep_more_state(results):
    rows = results["optimizer_quality_scratch_1m"]
    assert make_tables.best_peer(rows[0], rows, higher_is_better=False).system == "AdamW"


def test_a_published_detector_is_a_peer_and_an_oracle_is_none(results):
    rows = results["ood_quality"]
    assert make_tables.best_peer(rows[0], rows, higher_is_better=True).system == "medix paper"


def test_pages_agree_with_the_committed_results():
    assert list(make_tables.stale()) == [], "run python benchmarks/make_tables.py"


@pytest.mark.parametrize("page", make_tables.blocks({}))
def test_a_page_names_the_command_of_what_is_not_measured(page):
    text = (make_tables.ROOT / page).read_text()
    block = text.split(make_tables.BEGIN)[1].split(make_tables.END)[0]
    results = make_tables.load()
    pairs = [(Path(page).stem, file) for file in make_tables.PAGES.get(page, ())]
    pairs = pairs or [(headline.method, headline.file) for headline in make_tables.HEADLINES]
    for _, file in pairs:
        assert make_tables.command(file) in block
    missing = [file for method, file in pairs if not make_tables.is_measured(method, file, results)]
    assert ("Not measured yet" in block) == bool(missing)
    assert all(make_tables.command(file) in block.partition("Not measured yet")[2] for file in missing)


@pytest.mark.parametrize("file", sorted({f for files in make_tables.PAGES.values() for f in files}))
def test_every_command_shown_is_a_script_of_the_repository(file):
    script = make_tables.command(file).strip("`").split()[1]
    assert (make_tables.ROOT / script).is_file()


def test_every_result_is_shown_somewhere():
    shown = {file for files in make_tables.PAGES.values() for file in files}
    assert set(make_tables.load()) <= shown
    assert {headline.file for headline in make_tables.HEADLINES} <= shown


def test_the_best_peer_has_no_more_bytes_and_is_not_ours(results):
    rows = results["kv_quality"]
    ours = next(row for row in rows if row.system == "ojakv" and row.setting == "BBC, all contexts, ratio 0.6")
    peer = make_tables.best_peer(ours, rows, higher_is_better=False)
    assert peer.system == "int8 per token"


def test_a_peer_without_a_byte_row_still_competes(results):
    rows = results["decode_speed"]
    ours = next(row for row in rows if row.system == "packed" and row.unit == "x")
    assert make_tables.best_peer(ours, rows, higher_is_better=True).system == "StaticCache"


def test_a_paper_s_form_is_a_peer_and_what_reads_every_key_is_not(results):
    rows = results["retrieval_quality"]
    for system in ("sentencekv", "hybridkv"):
        ours = next(row for row in rows if row.system == system)
        assert make_tables.best_peer(ours, rows, higher_is_better=False).system == "sentencekv paper"


def test_the_peer_of_osd_is_a_codec_of_others_and_not_the_uncompressed_delta(results):
    rows = results["delta_quality_small"]
    ours = next(row for row in rows if row.system == "osd")
    assert make_tables.best_peer(ours, rows, higher_is_better=True).system == "seeded mask + sign"


def test_a_file_that_says_nothing_about_a_method_is_not_measured(results):
    for row in results["decode_speed"]:
        assert make_tables.is_measured(row.method, "decode_speed", results)
    results["decode_speed"] = [row for row in results["decode_speed"] if row.method == "packed"]
    page = make_tables.page_tables("sentencekv", ("retrieval_quality", "decode_speed"), results)
    assert page.startswith("Measured by `python benchmarks/retrieval_quality.py`:")
    assert page.endswith("Not measured yet: `python benchmarks/decode_speed.py`.")
    assert "StaticCache" not in page
    text = make_tables.headline_table(results)
    assert "`sentencekv` by `python benchmarks/decode_speed.py`" in text.partition("Not measured yet")[2]
    assert "| `packed` |" in text


def test_no_peer_is_no_peer():
    ours = Row("ojakv", "ojakv", "s", "m", 1.0)
    assert make_tables.best_peer(ours, [ours], higher_is_better=False) is None


def test_the_readme_has_a_line_per_headline(results):
    text = make_tables.headline_table(results)
    lines = text.splitlines()
    assert len(lines) == 2 + len(make_tables.HEADLINES)
    assert "Not measured yet" not in text
    line = next(line for line in lines if "loss above dense" in line)
    assert "| 0.02 nats, 60% of the bytes" in line
    assert "int8 per token: -0.001 nats, 52% of the bytes" in line
    assert "`python benchmarks/kv_quality.py`" in line


def test_a_headline_without_a_row_is_an_error(results):
    results["decode_speed"] = [row for row in results["decode_speed"] if row.system != "packed"]
    with pytest.raises(SystemExit, match="decode_speed.json has no row"):
        make_tables.headline_table(results)


def test_a_page_has_every_value_of_its_files_once(results):
    text = make_tables.page_tables("ojakv", ("kv_quality", "decode_speed", "end_to_end"), results)
    assert text.count("**loss above dense (nats)**, BBC; n = 24, ± standard deviation") == 1
    assert "| system | all contexts | 1024 tokens |" in text
    assert "| ojakv, ratio 0.6 | 0.02 ± 0.01 | 0.04 ± 0.01 |" in text
    assert "| int8 per token | -0.001 ± 0.01 |  |" in text
    assert "**speed over DynamicCache (x)**, a layer, 32K, 1 thread; n = 24" in text
    assert "| system | float32 | bfloat16 |" in text
    assert text.endswith("Not measured yet: `python benchmarks/end_to_end.py`.")


def test_check_finds_a_stale_page_and_writing_mends_it(results, tmp_path, monkeypatch, capsys):
    for page in make_tables.blocks({}):
        path = tmp_path / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"above\n{make_tables.BEGIN}\nold\n{make_tables.END}\nbelow\n")
    for name, rows in results.items():
        write_rows(tmp_path / "benchmarks" / "results" / f"{name}.json", rows)
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    assert make_tables.main(["--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().out
    assert make_tables.main([]) == 0
    assert make_tables.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"above\n{make_tables.BEGIN}\n| method |")
    assert text.endswith(f"{make_tables.END}\nbelow\n")
    write_rows(tmp_path / "benchmarks" / "results" / "decode_speed.json", rows_of_decode_speed()[::-1])
    assert make_tables.main(["--check"]) == 1, "changed results must show"


def rows_to_plot():
    """A dense cache that stops early, a cache of ours, and a system that no plot shows."""
    rows = []
    for tokens, kind in ((2, "float32"), (2, "bfloat16"), (8, "float32"), (8, "bfloat16"), (32, "float32")):
        for system in ("DynamicCache", "sentencekv, on disk", "sentencekv, refresh 8"):
            if system != "DynamicCache" or tokens < 32:
                setting = f"a layer, {tokens}K, {kind}, 1 thread"
                rows.append(Row("packed", system, setting, "decode step", 1.5 * tokens, "ms", 24, 0.1))
                rows.append(Row("packed", system, setting, "resident bytes", 4.0 * tokens, "MB"))
    return rows


def test_plots_are_the_same_bytes_at_every_run_and_show_what_was_measured(tmp_path):
    results = write_rows(tmp_path / "decode_speed.json", rows_to_plot())
    for folder in ("a", "b"):
        make_plots.main(["--results", str(results), "--out", str(tmp_path / folder)])
    names = ["decode_step.svg", "resident_bytes.svg"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name, unit in zip(names, ("ms", "MB")):
        text = (tmp_path / "a" / name).read_text()
        assert (tmp_path / "b" / name).read_text() == text
        shown = [system for system in make_plots.STYLES if f">{system}<" in text]
        assert shown == ["DynamicCache", "sentencekv, on disk"]
        assert all(part in text for part in (">float32<", ">bfloat16<", ">32K<", f"({unit})", "a layer, 1 thread"))
        assert len(text) < 60_000
    write_rows(results, [replace(row, value=row.value + row.value**2) for row in rows_to_plot()])
    make_plots.main(["--results", str(results), "--out", str(tmp_path / "b")])
    assert all((tmp_path / "a" / name).read_text() != (tmp_path / "b" / name).read_text() for name in names)


def test_results_without_a_system_to_plot_are_an_error(tmp_path):
    results = write_rows(tmp_path / "x.json", [row for row in rows_to_plot() if row.system.endswith("refresh 8")])
    with pytest.raises(SystemExit, match="no 'decode step' of any of DynamicCache"):
        make_plots.main(["--results", str(results), "--out", str(tmp_path)])


def test_every_plot_a_page_shows_is_committed_and_small():
    shown = set()
    for page in (make_plots.ROOT / "docs" / "methods").glob("*.md"):
        shown |= {(page.parent / link).resolve() for link in re.findall(r"\]\((.+\.svg)\)", page.read_text())}
    assert {path.name for path in shown} == {f"{metric.replace(' ', '_')}.svg" for metric in make_plots.METRICS}
    assert all(path.stat().st_size < 60_000 for path in shown)
