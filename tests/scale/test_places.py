"""Names of files behind URLs: what a worker opens is what was found."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from command_line import write
from safeside.errors import InputError
from safeside.scale.places import Folder, address, opened
from safeside.scale.reading import Shard, Span, find_files, open_reader


class Hosted(MemoryFileSystem):
    """A file system that keeps its host beside the path, as those of hdfs, ftp and sftp do."""

    protocol = "hosted"
    store: dict[str, Any] = {}  # noqa: RUF012  # as the parent declares it
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = True

    def __init__(self, host: str = "", **options: object) -> None:
        super().__init__(**options)
        self.host = host

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        name = path.removeprefix("hosted://")
        return "/" + name.partition("/")[2] if path.startswith("hosted://") else path.rstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": path.removeprefix("hosted://").partition("/")[0]}


class Web(MemoryFileSystem):
    """Files by their whole address, as fsspec's file system of HTTP has them; none can be listed."""

    protocol = "https"
    store: dict[str, Any] = {}  # noqa: RUF012  # as the parent declares it
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def isdir(self, path: str) -> bool:
        raise PermissionError(f"403 for the folder {path}")


@pytest.fixture
def hosted() -> Iterator[None]:
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    yield
    Hosted.store.clear()


def test_hosts_survive(hosted: None) -> None:
    Folder("hosted://name:8020/data").write("deep/rows.jsonl", [b'{"text": "hi"}\n'])
    for place in ("hosted://name:8020/data/", "hosted://name:8020/data/*/rows.jsonl"):
        assert find_files(place) == ["hosted://name:8020/data/deep/rows.jsonl"]
    files, path = opened(address("hosted://name:8020/data"))
    assert (files.host, path) == ("name:8020", "/data")


@pytest.mark.parametrize("place", ["zip://rows.jsonl::{zip}", "zip://::{zip}", "zip://*.jsonl::file://{zip}"])
def test_chains_survive(tmp_path: Path, place: str) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as whole:
        whole.writestr("rows.jsonl", '{"text": "hi"}\n')
    place = place.format(zip=tmp_path / "all.zip")
    (found,) = find_files(place)
    assert found == f"zip://rows.jsonl::{place.partition('::')[2]}"
    assert open_reader(found).read(Span(1, 1, 1)).rows == [(1, {"text": "hi"})]


def test_the_end_of_a_chain_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as whole:
        whole.writestr("rows.jsonl", "{}\n")
    monkeypatch.chdir(tmp_path)
    assert find_files("zip://rows.jsonl::all.zip") == [f"zip://rows.jsonl::{tmp_path}/all.zip"]
    assert Shard(0, "zip://deep/rows.parquet::all.zip", Span(1, 1, 1)).part == "part-000000.parquet"


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_a_web_address_may_end_with_a_signature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(_registry, "https", Web)
    place, other = (f"https://host/{file}?sig=a%2Fb&until=2030.txt" for file in (name, "notes.txt"))
    if name.endswith("t"):
        pq.write_table(pa.table({"text": ["hi"]}), tmp_path / name)
    else:
        write(tmp_path / name, [{"text": "hi"}])
    Web().pipe_file(place, (tmp_path / name).read_bytes())
    assert find_files(place) == [place]
    assert open_reader(place).read(Span(1, 1, 1)).rows == [(1, {"text": "hi"})]
    assert Shard(0, place, Span(1, 1, 1)).part == f"part-000000.{name.split('.')[1]}"
    with pytest.raises(InputError, match="403"):
        find_files(other)


def test_a_url_that_cannot_be_named_again_is_refused(hosted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that finds files under another root than its URL says."""
    Folder("hosted://name/data").write("rows.jsonl", [b"{}\n"])
    monkeypatch.setattr(Hosted, "_strip_protocol", classmethod(lambda cls, path: "/data"))
    with pytest.raises(InputError, match="cannot be named so that a worker finds them again"):
        find_files("hosted://name/alias")
