"""One rule decides between a local path and a Hub id."""

import pytest

from jnana.processing.data.paths import is_hub_id, names_local_path


HUB_IDS = ["gpt2", "microsoft/phi-2", "liuhaotian/LLaVA-Instruct-150K", "org/model.v1_2", "not/here", "whisper-small"]
LOCAL_PATHS = [
    *("here", "here/inside", "here/file"),  # these exist
    *("/absolute/path", "/absolute", "./relative", "../above", ".hidden", "~/home", "~someone/data"),
    *("three/part/path", "captions.json", "folder/captions.json", "Train.CSV", "shards/0001.tar", "corpus.txt.gz"),
    *("shards/*.parquet", "data[0-9]", "with space/data", "C:\\data\\captions", "folder\\sub", "folder/", ""),
    *("https://example.com/data", "hf://datasets/org/name"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    (tmp_path / "here" / "file").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", HUB_IDS)
def test_hub_ids(name):
    assert is_hub_id(name) and not names_local_path(name)


@pytest.mark.parametrize("name", LOCAL_PATHS)
def test_local_paths(name):
    assert names_local_path(name) and not is_hub_id(name)


def test_a_directory_hides_the_hub_id_of_the_same_name(tmp_path):
    assert is_hub_id("microsoft/phi-2")
    (tmp_path / "microsoft" / "phi-2").mkdir(parents=True)
    assert not is_hub_id("microsoft/phi-2")
