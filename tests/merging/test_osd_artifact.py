"""The folder and what is made of it: saved, read, checked against its base, restored, combined, and damaged."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ext.artifact import read_artifact
from hf_ext.errors import ArtifactError, BlobError, ConfigError, DeltaError
from hf_ext.merging.blob import Delta, encode
from hf_ext.merging.compress import compress_delta
from hf_ext.merging.deltas import Checkpoint
from hf_ext.merging.osd_artifact import WEIGHTS_NAME, OSDArtifact, combine, decode_tensor, restore
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.tiny import tiny_model
from tests.merging.helpers import save, store_head_too, tuned_model, write_file


def compress(base, tuned, **settings):
    return compress_delta(base, tuned, OSDConfig(**{"budget": 8_000} | settings), progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and a fine-tune on disk."""
    root = tmp_path_factory.mktemp("checkpoints")
    save(tiny_model("llama_tied"), root / "base")
    save(tuned_model("llama_tied"), root / "tuned")
    return root / "base", root / "tuned"


@pytest.fixture(scope="module")
def artifact(folders):
    return compress(*folders, other_tensors="code")


def read_all(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def expected(base, artifact, dtype):
    """Base plus dense deltas, by hand."""
    found = {}
    for name, weight in base.items():
        found[name] = weight
        if name in artifact.deltas:
            found[name] = (weight.float() + torch.from_numpy(artifact.deltas[name].dense())).to(dtype)
    return found


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


# Save and load


@pytest.mark.parametrize("codec", ["factors", "signs", "sparse"])
def test_a_saved_artifact_comes_back(codec, folders, tmp_path):
    before = compress(*folders, codec=codec, budget=5_000, relaxation=1)
    before.save_pretrained(tmp_path)
    after = OSDArtifact.from_pretrained(tmp_path)
    assert list(after.deltas) == list(before.deltas)
    assert encode(after.deltas) == encode(before.deltas)
    assert after.config.to_dict() == before.config.to_dict()
    assert (
        after.bytes_before == before.bytes_before == 4 * sum(p.numel() for p in tiny_model("llama_tied").parameters())
    )
    errors = {report.name: (report.error / report.energy) ** 0.5 for report in before.reports}
    for report in after.reports:
        assert (report.error / report.energy) ** 0.5 == pytest.approx(errors[report.name], rel=1e-3)


def test_the_manifest_says_what_was_measured(artifact, tmp_path):
    artifact.save_pretrained(tmp_path)
    manifest = read_artifact(tmp_path)
    rows = {row.what: row.value for row in manifest.measured}
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert rows["bytes after"] == size == artifact.nbytes()
    assert rows["bytes before"] == artifact.bytes_before
    assert manifest.method == "osd"
    assert manifest.library_name == "peft"
    kinds = {report.kind for report in artifact.reports}
    assert {f"relative error, {kind}" for kind in kinds} <= set(rows)
    assert all(0 <= rows[f"relative error, {kind}"] for kind in kinds)


@pytest.mark.parametrize("size", [9, 99, 999, 9_999, 99_999])
def test_the_size_in_the_manifest_is_right_whatever_its_digits(size, artifact):
    """Sizes near a power of ten, where naming the size changes it."""
    plain = replace(artifact, choice="")
    for extra in range(max(0, size - plain.nbytes() - 4), max(0, size - plain.nbytes() - 4) + 9):
        padded = replace(artifact, choice="x" * extra)
        files = padded._files()
        stated = json.loads(files["artifact.json"])["measured"]
        assert ["bytes after", padded.nbytes(), "bytes"] in stated
        if padded.nbytes() > size + 9:
            break


def test_the_deltas_are_encoded_once_to_learn_the_size(artifact, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_ext.merging.osd_artifact.encode", lambda deltas: calls.append(1) or encode(deltas))
    assert artifact.nbytes() > 0
    assert len(calls) == 1


def test_the_table_adds_up(artifact):
    lines = artifact.table()
    assert [line["tensor"] for line in lines] == list(artifact.deltas)
    for line in lines:
        delta = artifact.deltas[line["tensor"]]
        assert line["shape"] == "x".join(map(str, delta.shape))
        assert 0 < line["density"] <= 1
        assert line["rank"] == len(delta.factors()[0])
        assert line["bytes"] > 0
        assert line["form"]
    header = len(encode({name: Delta(delta.shape) for name, delta in artifact.deltas.items()}))
    assert sum(line["bytes"] for line in lines) == pytest.approx(len(encode(artifact.deltas)) - header, abs=30)


def test_saving_again_replaces_the_files_and_leaves_nothing_else(artifact, tmp_path):
    artifact.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    artifact.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_plain_lora_holds_the_deltas_of_the_matrices(folders, tmp_path):
    from peft import PeftModel

    artifact = compress(*folders, codec="factors", other_tensors="drop")
    ranks = {name: len(delta.factors()[0]) for name, delta in artifact.deltas.items()}
    artifact.save_pretrained(tmp_path, lora_rank=max(ranks.values()))
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    after = dict(merged.named_parameters())
    for name, delta in artifact.deltas.items():
        dense = torch.from_numpy(delta.dense())
        assert (after[name] - before[name] - dense).norm() <= 1e-3 * dense.norm() + 1e-5
    with pytest.raises(ConfigError, match="lora_rank=0"):
        artifact.save_pretrained(tmp_path, lora_rank=0)


# The base


def test_another_base_is_refused_unless_forced(artifact, folders, tmp_path):
    artifact.check_base(Checkpoint.open(folders[0]))
    artifact.check_base(Checkpoint.open(tiny_model("llama_tied")))
    other = Checkpoint.open(tiny_model("llama_tied", seed=3))
    with pytest.raises(DeltaError, match="is not the base this delta was taken from"):
        artifact.check_base(other)
    artifact.check_base(other, force=True)
    save(tiny_model("llama_tied", seed=3), tmp_path / "other")
    with pytest.raises(DeltaError, match="force=True"):
        restore(artifact, tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    restore(artifact, tmp_path / "out", base=tmp_path / "other", force=True)
    assert_equal(read_all(tmp_path / "out"), expected(read_all(tmp_path / "other"), artifact, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_in_another_precision_is_still_the_base(artifact, dtype, tmp_path):
    save(tiny_model("llama_tied"), tmp_path, dtype)
    artifact.check_base(Checkpoint.open(tmp_path))


def test_another_architecture_is_refused_even_if_forced(artifact, tmp_path):
    for arch in ("gpt2", "opt"):
        for force in (False, True):
            with pytest.raises(DeltaError, match="another architecture"):
                artifact.check_base(Checkpoint.open(tiny_model(arch)), force)


def test_a_base_of_another_size_is_refused_even_if_forced(artifact, tmp_path):
    save(tiny_model("llama_tied", hidden_size=32), tmp_path / "narrow")
    for force in (False, True):
        with pytest.raises(DeltaError):
            restore(artifact, tmp_path / "out", base=tmp_path / "narrow", force=force)
        assert not (tmp_path / "out").exists()


# Restore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "60KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("arch", ["llama_tied", "gpt2", "opt"])
def test_restore_writes_base_plus_deltas_in_the_base_type(arch, shards, dtype, tmp_path):
    save(tiny_model(arch), tmp_path / "base", dtype, max_shard_size=shards)
    save(tuned_model(arch), tmp_path / "tuned", dtype)
    artifact = compress(tmp_path / "base", tmp_path / "tuned", other_tensors="code")
    artifact.save_pretrained(tmp_path / "small")
    folder = restore(tmp_path / "small", tmp_path / "out")
    assert folder == tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "base").iterdir()}

    base = {n: w.to(dtype) for n, w in tiny_model(arch).named_parameters()}
    wanted = expected(base, artifact, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(artifact.deltas) > 5
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        assert torch.equal(weight, wanted[name]), name
        assert name not in artifact.deltas or not torch.equal(weight, base[name])
    if "tied" in arch:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_restore_moves_towards_the_fine_tune(folders, tmp_path):
    artifact = compress(*folders, budget=30_000, codec="factors", other_tensors="code")
    restore(artifact, tmp_path / "out")
    base, tuned, found = (read_all(folder) for folder in (*folders, tmp_path / "out"))
    before = sum(float((tuned[n] - base[n]).pow(2).sum()) for n in base)
    after = sum(float((tuned[n] - found[n]).pow(2).sum()) for n in base)
    assert after < 0.7 * before


def test_a_head_stored_beside_its_embedding_changes_with_it(folders, tmp_path):
    """Other trainers write both; restored, they must still be equal, or the head is no longer tied."""
    base = shutil.copytree(folders[0], tmp_path / "base")
    tuned = shutil.copytree(folders[1], tmp_path / "tuned")
    store_head_too(base)
    artifact = compress(base, tuned, other_tensors="code", codec="factors")
    assert "model.embed_tokens.weight" in artifact.deltas
    restored = read_all(restore(artifact, tmp_path / "out"))
    assert not torch.equal(restored["model.embed_tokens.weight"], read_all(base)["model.embed_tokens.weight"])
    assert torch.equal(restored["lm_head.weight"], restored["model.embed_tokens.weight"])


def test_a_name_that_ends_like_another_is_left_alone(tmp_path):
    """`norm.weight` is not `block.norm.weight`."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(48, 48, generator=generator) for name in ("proj.weight", "block.proj.weight")}
    tuned = dict(base)
    tuned["block.proj.weight"] = base["block.proj.weight"] + 0.1 * torch.randn(48, 48, generator=generator)
    write_file(tmp_path / "base", base)
    write_file(tmp_path / "tuned", tuned)
    artifact = compress(tmp_path / "base", tmp_path / "tuned")
    assert list(artifact.deltas) == ["block.proj.weight"]
    assert_equal(read_all(restore(artifact, tmp_path / "out")), expected(base, artifact, torch.float32))


def test_restore_of_a_bare_checkpoint_keeps_its_names(tmp_path):
    """GPT-2 as published lacks the `transformer.` its wrapped form has."""
    save(tiny_model("gpt2"), tmp_path / "base")
    save(tuned_model("gpt2"), tmp_path / "tuned")
    for folder in ("base", "tuned"):
        file = tmp_path / folder / "model.safetensors"
        weights = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    artifact = compress(tmp_path / "base", tmp_path / "tuned", codec="factors")
    assert all(name.startswith(("transformer.", "lm_head")) for name in artifact.deltas)
    bare = {
        "transformer." + k if not k.startswith("lm_head") else k: v for k, v in read_all(tmp_path / "base").items()
    }
    wanted = expected(bare, artifact, torch.float32)
    found = read_all(restore(artifact, tmp_path / "out"))
    assert_equal(found, {name.removeprefix("transformer."): weight for name, weight in wanted.items()})


def test_an_empty_artifact_restores_the_base(folders, tmp_path):
    artifact = compress(folders[0], folders[0])
    assert artifact.deltas == {}
    assert_equal(read_all(restore(artifact, tmp_path / "out")), read_all(folders[0]))


def test_restore_refuses_a_folder_with_files_in_it(artifact, tmp_path):
    (tmp_path / "out").mkdir()
    restore(artifact, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not empty"):
        restore(artifact, tmp_path / "out")


def test_a_failed_restore_leaves_nothing_behind(artifact, folders, tmp_path):
    broken = replace(artifact, deltas=artifact.deltas | {"model.other.weight": Delta((3, 3))})
    with pytest.raises(DeltaError, match=r"model\.other\.weight"):
        restore(broken, tmp_path / "out", base=folders[0], force=True)
    with pytest.raises(DeltaError):
        restore(artifact, tmp_path / "out", base=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


# Combine


@pytest.fixture(scope="module")
def three(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("more")
    found = []
    for seed, codec in ((1, "factors"), (2, "signs"), (3, "factors")):
        save(tuned_model("llama_tied", seed=seed), root / str(seed))
        found.append(compress(folders[0], root / str(seed), codec=codec, other_tensors="code", budget=7_000))
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.25, 2.0), (0.0, 1.0, 0.3)], ids=str)
def test_the_combination_is_the_weighted_sum(weights, three, tmp_path):
    combined = combine(three, weights)
    assert set(combined.deltas) == {name for item in three for name in item.deltas}
    combined.save_pretrained(tmp_path)
    loaded = OSDArtifact.from_pretrained(tmp_path)
    for name, delta in loaded.deltas.items():
        wanted = np.zeros(delta.shape)
        size = 0.0
        for item, weight in zip(three, weights):
            if name in item.deltas:
                dense = item.deltas[name].dense().astype(np.float64)
                wanted += weight * dense
                size += abs(weight) * np.linalg.norm(dense)
        # A float16 step is right to 2**-11.
        assert np.linalg.norm(delta.dense() - wanted) <= 2**-10 * size + 1e-7


def test_a_combination_knows_its_base_where_all_cover_the_same_tensors(three, folders):
    one = combine([three[0]], [1.0])
    one.check_base(Checkpoint.open(folders[0]))
    with pytest.raises(DeltaError, match="is not the base"):
        one.check_base(Checkpoint.open(tiny_model("llama_tied", seed=3)))


def test_small_weights_do_not_lose_the_step(three):
    combined = combine([three[0]], [1e-4])
    for name, delta in combined.deltas.items():
        wanted = 1e-4 * three[0].deltas[name].dense().astype(np.float64)
        assert np.linalg.norm(delta.dense() - wanted) <= 0.01 * np.linalg.norm(wanted), name


def test_what_cannot_be_combined_is_refused(three):
    with pytest.raises(ConfigError, match="0 artifacts"):
        combine([], [])
    with pytest.raises(ConfigError, match="3 artifacts and 2 weights"):
        combine(three, [1.0, 2.0])
    other = replace(three[0], config=replace(three[0].config, base_model_name_or_path="org/other"))
    with pytest.raises(ConfigError, match="different bases.*org/other"):
        combine([three[0], other], [1, 1])
    name = next(iter(three[0].deltas))
    other = replace(three[0], deltas={name: Delta((2, 2))})
    with pytest.raises(ConfigError, match=f"{name} has shape"):
        combine([three[0], other], [1, 1])
    for weight in (float("nan"), float("inf"), 1e30):
        with pytest.raises(ConfigError, match="weight"):
            combine(three, [weight, 1.0, 1.0])
    with pytest.raises(ConfigError, match="weight"):
        combine([three[1]], [1e300])


def test_more_terms_than_a_file_holds_are_refused(three):
    many = [three[0]] * 70
    with pytest.raises(ConfigError, match="terms"):
        combine(many, [0.01] * 70)


# Damage


def test_every_truncation_of_the_weights_is_refused(artifact, tmp_path):
    artifact.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS_NAME
    content = file.read_bytes()
    for end in [*range(0, 400, 7), *range(400, len(content), 501), len(content) - 1]:
        file.write_bytes(content[:end])
        with pytest.raises(BlobError):
            OSDArtifact.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        OSDArtifact.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(3)},
        {"osd_blob": torch.zeros(40)},
        {"osd_blob": torch.zeros(4, 10, dtype=torch.uint8)},
        {"osd_blob": torch.zeros((), dtype=torch.uint8)},
        {"osd_blob": torch.zeros(0, dtype=torch.uint8)},
        {"osd_blob": torch.zeros(99, dtype=torch.uint8)},
    ],
    ids=lambda tensors: " ".join(f"{k} {v.dtype} {tuple(v.shape)}" for k, v in tensors.items()),
)
def test_files_with_something_else_in_them_are_refused(tensors, artifact, tmp_path):
    artifact.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(BlobError):
        OSDArtifact.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "errors",
    [
        torch.zeros(()),
        torch.zeros(2),
        torch.full((99, 2), 3.0),
        torch.full((99,), float("nan")),
        torch.full((99,), float("inf")),
    ],
    ids=lambda e: f"{e.dtype} {tuple(e.shape)} {e.reshape(-1)[0]}",
)
def test_errors_of_the_wrong_form_do_not_keep_a_file_from_opening(errors, artifact, tmp_path):
    """They are for the table alone."""
    artifact.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS_NAME
    if len(errors.shape) and errors.shape[0] == 99:
        errors = errors[: len(artifact.deltas)].contiguous()
    save_file({"osd_blob": load_file(file)["osd_blob"], "osd_error": errors}, file)
    loaded = OSDArtifact.from_pretrained(tmp_path)
    assert encode(loaded.deltas) == encode(artifact.deltas)
    loaded.save_pretrained(tmp_path / "again")


def test_a_tensor_of_bytes_is_decoded_as_a_blob(artifact):
    blob = torch.frombuffer(bytearray(encode(artifact.deltas)), dtype=torch.uint8)
    assert encode(decode_tensor(blob)) == encode(artifact.deltas)
    with pytest.raises(BlobError, match="int8"):
        decode_tensor(blob.to(torch.int8))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "list"),
        ('{"peft_type": "LORA"}', "another kind of adapter"),
        ('{"peft_type": "OSD", "base_fingerprint": "x"}', "base_fingerprint"),
        ('{"peft_type": "OSD", "codec": "zip"}', "codec"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_config_is_refused(text, match, artifact, tmp_path):
    artifact.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises((ArtifactError, ConfigError), match=match):
        OSDArtifact.from_pretrained(tmp_path)


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="no/where"):
        OSDArtifact.from_pretrained("no/where")
    with pytest.raises(ArtifactError, match="adapter_config"):
        OSDArtifact.from_pretrained(tmp_path)
