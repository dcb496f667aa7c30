"""Every registered task passes the same checks; so does a stranger's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from safeside.errors import ConfigError, UnknownNameError
from safeside.tasks.sources import Part, Source
from safeside.tasks.task import TASKS, Task, register_task
from tasks.conformance import CHECKS, task_named


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` keeps goes to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", list(TASKS))
def test_a_registered_task_conforms(check: Callable[[Task, Path], None], name: str, tmp_path: Path) -> None:
    check(task_named(name), tmp_path)


@pytest.fixture
def puns() -> Iterator[Task]:
    parts = [Part(f"{split}.jsonl") for split in ("train", "validation", "test")]
    task = Task("tests/puns", ("pun",), (Source("jokes", *parts),), windows="min")
    register_task("tests/puns", task)
    yield task
    TASKS.unregister("tests/puns")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_task_of_ones_own_conforms(check: Callable[[Task, Path], None], puns: Task, tmp_path: Path) -> None:
    check(task_named(puns.name), tmp_path)


def test_names_are_taken_once_and_neighbours_are_suggested(puns: Task) -> None:
    register_task("tests/puns", puns)
    with pytest.raises(ConfigError, match="task 'tests/puns' is already registered"):
        register_task("tests/puns", Task("tests/puns", ("joke",), puns.sources))
    with pytest.raises(UnknownNameError, match=r"Unknown task 'promt_harm'.*Did you mean 'prompt_harm'"):
        TASKS.get("promt_harm")


@pytest.mark.parametrize(
    ("labels", "sources", "problem"),
    [
        ((), ("a",), "needs a label"),
        (("harm",), (), "needs a label, and sources"),
        (("harm",), ("a", "a"), "sources with different names"),
    ],
)
def test_a_task_without_labels_or_sources_is_an_error(
    labels: tuple[str, ...], sources: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Task("bad", labels, tuple(Source(name) for name in sources))


def test_a_label_after_the_first_is_a_category() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown category 'privat'.*Did you mean 'privacy'"):
        Task("bad", ("harm", "privat"), (Source("a"),))
