import json
import os

import pytest

from hf_ext.artifact import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Artifact,
    Measured,
    manifest_bytes,
    read_artifact,
    safe_name,
    write_manifest,
)
from hf_ext.errors import ArtifactError, HfExtError


FULL = Artifact(
    method="osd",
    library_name="peft",
    base_model="org/base",
    base_revision="0" * 40,
    license="apache-2.0",
    tags=("text-generation", "één"),
    config={"rank": 8, "nested": {"a": [1, 2.5, None, True]}},
    measured=(Measured("bytes before", 538090408, "bytes"), Measured("recovery", 0.993)),
    snippet='print(REPO)\nprint("$x {y}")\n',
)


def manifest(folder, **changes):
    """A folder with a manifest that is right except for `changes`; a value of `...` leaves the key out."""
    data = {"format_version": 1, "method": "osd", "library_name": "peft", "config": {}, **changes}
    (folder / MANIFEST_NAME).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return folder


def fill(folder, **files):
    for name, size in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_what_is_written_is_read_back_with_its_folder(tmp_path):
    path = write_manifest(tmp_path / "new", FULL)
    assert path == tmp_path / "new" / MANIFEST_NAME
    found = read_artifact(tmp_path / "new")
    assert found.folder == tmp_path / "new"
    assert Artifact(**{**vars(found), "folder": None}) == FULL
    assert isinstance(found.measured[0].value, int)


def test_the_manifest_is_one_line_without_padding(tmp_path):
    text = write_manifest(tmp_path, FULL).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    assert text.startswith('{"format_version":1,"method":"osd"')
    assert '["bytes before",538090408,"bytes"],["recovery",0.993,""]' in text
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_the_bytes_are_known_before_anything_is_written(tmp_path):
    assert manifest_bytes(FULL) == write_manifest(tmp_path, FULL).read_bytes()
    with pytest.raises(ArtifactError, match="artifact.json: .* bytes exceed the limit"):
        manifest_bytes(Artifact("osd", config={"x": "y" * MAX_MANIFEST_BYTES}))


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path):
    before = write_manifest(tmp_path, FULL).read_bytes()
    for config in ({"x": float("nan")}, {"x": object()}, {"x": "y" * MAX_MANIFEST_BYTES}):
        with pytest.raises(ArtifactError, match="artifact.json"):
            write_manifest(tmp_path, Artifact("osd", config=config))
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before


def test_only_the_method_is_required(tmp_path):
    found = read_artifact(manifest(tmp_path, library_name=..., config=...))
    assert (found.library_name, found.config, found.measured, found.snippet) == ("hf-ext", {}, (), None)


def test_a_folder_without_manifest_is_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="holds no artifact.json"):
        read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="holds no artifact.json"):
        read_artifact(tmp_path / "absent")


@pytest.mark.parametrize(
    "text", ["", "{", "\xff", '{"config":NaN}', '{"a":' * 100_000, "[" * 100_000, '{"x":Infinity}']
)
def test_what_is_not_json_is_refused(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        read_artifact(tmp_path)


def test_a_manifest_beyond_the_limit_is_not_read(tmp_path):
    manifest(tmp_path, snippet="x" * MAX_MANIFEST_BYTES)
    with pytest.raises(ArtifactError, match="larger than 1000000 bytes"):
        read_artifact(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    with pytest.raises(
        ArtifactError, match="format_version 2 is newer than 1.*upgrade it with `pip install -U hf-ext`"
    ):
        read_artifact(manifest(tmp_path, format_version=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 0),
        ("format_version", ...),
        ("method", 3),
        ("method", ...),
        ("method", "../osd"),
        ("method", ""),
        ("library_name", ""),
        ("library_name", "a\nb"),
        ("base_model", "a/b/c"),
        ("base_model", "C:\\model"),
        ("base_model", "./model"),
        ("base_model", 1),
        ("base_revision", "a b"),
        ("license", "mit\nevil: yes"),
        ("tags", "tag"),
        ("tags", [1]),
        ("tags", [""]),
        ("config", []),
        ("config", None),
        ("snippet", 1),
        ("snippet", "\ud800"),
        ("measured", {}),
        ("measured", [["x", 1]]),
        ("measured", [["x", "1", ""]]),
        ("measured", [["x", True, ""]]),
        ("measured", [["x", 10**400, ""]]),
        ("measured", [["", 1, ""]]),
        ("measured", [["x\ny", 1, ""]]),
        ("measured", [["x", 1, None]]),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, field, value):
    with pytest.raises(ArtifactError, match=field):
        read_artifact(manifest(tmp_path, **{field: value}))


@pytest.mark.parametrize("text", ['"config":{"a":[1e999]}', '"measured":[["x",1e999,""]]'])
def test_a_number_that_overflows_is_refused(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(f'{{"format_version":1,"method":"osd",{text}}}')
    with pytest.raises(ArtifactError, match="finite"):
        read_artifact(tmp_path)


def test_unknown_keys_are_ignored_with_a_warning(tmp_path, caplog):
    assert read_artifact(manifest(tmp_path, colour="red")).method == "osd"
    assert "unknown keys colour are ignored" in caplog.text


def test_a_local_path_is_no_base_model():
    with pytest.raises(ArtifactError, match="base_model is not a Hub id"):
        Artifact("osd", base_model="/".join(["", "home", "me", "model"]))


def test_errors_can_be_caught_as_the_builtin():
    assert issubclass(ArtifactError, HfExtError)
    assert issubclass(ArtifactError, OSError)


def test_files_are_listed_by_name_and_size(tmp_path):
    fill(tmp_path, **{"w.safetensors": 10, "lora__w.safetensors": 20, "README.md": 30, "a__b__c.json": 1})
    manifest(tmp_path)
    found = read_artifact(tmp_path)
    size = (tmp_path / MANIFEST_NAME).stat().st_size
    assert found.files() == {
        "README.md": 30,
        "a/b/c.json": 1,
        MANIFEST_NAME: size,
        "lora/w.safetensors": 20,
        "w.safetensors": 10,
    }
    assert found.nbytes() == 10 + 1 + size


def test_only_the_card_at_the_top_is_not_counted(tmp_path):
    fill(tmp_path, **{"sub__README.md": 5, "lora.json": 7})
    size = manifest(tmp_path).joinpath(MANIFEST_NAME).stat().st_size
    assert read_artifact(tmp_path).nbytes() == 12 + size


@pytest.mark.parametrize("name", [".DS_Store", "sub__.hidden", ".git__config"])
def test_hidden_files_are_refused(tmp_path, name):
    fill(manifest(tmp_path), **{name: 1})
    with pytest.raises(ArtifactError, match="is hidden"):
        read_artifact(tmp_path).files()


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder, outside = tmp_path / "a", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("x")
    os.symlink(outside, manifest(folder) / "link")
    with pytest.raises(ArtifactError, match="link is a link out of the folder"):
        read_artifact(folder).files()
    os.remove(folder / "link")
    os.symlink(tmp_path, folder / "sub")
    with pytest.raises(ArtifactError, match="sub is a link"):
        read_artifact(folder).files()


def test_links_inside_the_folder_count_as_their_file(tmp_path):
    fill(manifest(tmp_path), w=4)
    os.symlink("w", tmp_path / "copy")
    assert read_artifact(tmp_path).files()["copy"] == 4


def test_an_artifact_without_folder_has_no_files():
    with pytest.raises(ArtifactError, match="no folder yet"):
        FULL.files()


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "één/x y.json", "a..b", "...a", ".gitattributes"])
def test_names_that_stay_below_a_folder_pass(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "//host/a",
        "~/a",
        "..",
        "a/../../b",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "a\\b",
        "..\\a",
        "C:a",
        "a/C:/b",
        "a:stream",
        "a\0b",
        "a\nb",
        "a\x7f",
        "a\u202eb",
        "a.",
        "a /b",
        None,
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(name):
    with pytest.raises(ArtifactError, match="it is refused"):
        safe_name(name)
