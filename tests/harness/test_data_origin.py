from types import SimpleNamespace

from qvlm_plugin.harness.data_origin import data_origin


def test_data_origin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "data"
    folder.mkdir(parents=True)
    (folder / "test.parquet").write_bytes(b"one")
    config = {"dataset_path": "org/data", "dataset_name": "full", "test_split": "test"}
    local = data_origin(config, {})
    assert local["origin"] == "local" and not local["stand_in"] and local["split"] == "test"
    (folder / "stand_in.json").write_text("{}")
    assert data_origin(config, {})["stand_in"]
    (folder / "test.parquet").write_bytes(b"two")
    assert data_origin(config, {})["content_hash"] != local["content_hash"]

    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = SimpleNamespace(cache_files=[{"filename": f"/cache/org___data/full/0.0.0/{revision}/data-test.arrow"}])
    hub = data_origin(config | {"dataset_path": "org/other"}, {"test": cached})
    assert (hub["origin"], hub["revision"], hub["stand_in"]) == ("hub", revision, False)
    assert data_origin(config | {"dataset_path": "org/other"}, {})["revision"] is None

    files = config | {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "org/data/test.parquet"}}}
    assert data_origin(files, {})["origin"] == "local"
