"""Adapters on disk: the same after a round trip, and every damage, mismatch or danger is an error that names it."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kills_for_tests import KilledError, kill_at
from safeside import Adapter, Base, Message, attach, create_adapter, load_adapter, make_config, save_adapter
from safeside import artifact as module
from safeside.adapters.config import Calibration
from safeside.artifact import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    annotate_adapter,
    copy_adapter,
    find_adapter,
    pull_adapter,
    push_adapter,
    read_config,
    read_provenance,
)
from safeside.errors import ConfigError, FormatError, InputError, MismatchError
from safeside.tasks.learnt import LEARNT_FILE, load_learnt, save_learnt
from safeside.types import Example

WRITTEN = [name for name in module.FILES if name != LEARNT_FILE]
TALK = [Message("user", "how can this be?"), Message("assistant", "they said so")]


@pytest.fixture(scope="module")
def saved(session_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved guard, small and calibrated: copy it before changing it."""
    guard = create_adapter(session_base, make_config(session_base, kind="plr", name="harm"), seed=3)
    guard.set_calibration(Calibration(scale=(2.0,), bias=(-0.7,), threshold=(0.3,)))
    return save_adapter(guard, tmp_path_factory.mktemp("saved") / "harm", session_base, {"dataset": "none"})


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` to break."""
    return Path(shutil.copytree(saved, tmp_path / "harm"))


def scores_of(base: Base, guard: Adapter) -> torch.Tensor:
    ids = torch.tensor([base.encode(TALK).ids])
    with attach(base, guards=[guard]) as attached, torch.no_grad():
        base.model(ids)
        return attached.record.scores[guard.name]


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change, add or (None) drop tensors, and leave the rest of the file as it was."""
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, metadata=metadata)


def edit(folder: Path, **values: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plr", "rtb", "lst"])
def test_a_saved_guard_scores_the_same(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path, kind: str
) -> None:
    guard = random_guard(tiny_base, kind=kind, readout="attention")
    guard.set_calibration(Calibration(scale=(1.5,), bias=(0.25,), threshold=(0.7,), false_positive_rate=0.01))
    loaded = load_adapter(save_adapter(guard, tmp_path), tiny_base)
    assert loaded.config == guard.config
    assert loaded.thresholds == (0.7,)
    assert torch.equal(scores_of(tiny_base, loaded), scores_of(tiny_base, guard))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_leaves_the_random_state_alone(tiny_base: Base, saved: Path) -> None:
    before = torch.get_rng_state()
    load_adapter(saved, tiny_base)
    create_adapter(tiny_base, make_config(tiny_base))
    assert torch.equal(torch.get_rng_state(), before)


def test_calibration_is_not_rounded_with_the_weights(tiny_base: Base, saved: Path) -> None:
    guard = load_adapter(saved, tiny_base).bfloat16()
    assert guard.dtype == torch.bfloat16
    assert guard.head.bias.tolist() == torch.tensor([-0.7]).tolist()


def test_the_same_adapter_is_the_same_bytes(tiny_base: Base, saved: Path, tmp_path: Path) -> None:
    guard = load_adapter(saved, tiny_base)
    for number in range(8):
        again = save_adapter(guard, tmp_path / str(number))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            assert (again / file).read_bytes() == (saved / file).read_bytes()


def test_a_folder_holds_four_files_and_no_path_of_the_machine(saved: Path, session_base: Base) -> None:
    assert sorted(file.name for file in saved.iterdir()) == sorted(WRITTEN)
    card, stamp = (saved / "README.md").read_text(), json.loads((saved / "provenance.json").read_text())
    assert 'load_adapter("path/to/harm", base)' in card
    assert "| thresholds | 0.3000 at a false-positive rate of 5% on validation data |" in card
    assert stamp["dataset"] == "none"
    assert 0 < float(stamp["flops_share"]) < 1
    assert str(saved.parent) not in card + json.dumps(stamp)


# ---- the wrong base --------------------------------------------------------------------------------------------------


def other_base(base: Base, folder: Path, change: Callable[[Path], None]) -> Base:
    """The same base with files that ``change`` has changed."""
    shutil.copytree(base.folder, folder)
    change(folder)
    return replace(base, folder=folder, name="other", attachment=None)


def edit_json(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def retrain(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})


def test_facts_are_added_without_a_changed_weight(saved: Path, tiny_base: Base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    files = {name: (folder / name).read_bytes() for name in ("adapter.safetensors", "safeside_config.json")}
    made = json.loads((folder / "provenance.json").read_text())
    before = set((folder / "README.md").read_text().splitlines())
    annotate_adapter(folder, {"licence": "MIT", "data, cats": "9 rows"})
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert json.loads((folder / "provenance.json").read_text()) == {**made, "licence": "MIT", "data, cats": "9 rows"}
    after = set((folder / "README.md").read_text().splitlines())
    assert after - before == {"| licence | MIT |", "| data, cats | 9 rows |"}
    assert before <= after
    load_adapter(folder, tiny_base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit_json("config.json", rms_norm_eps=0.5), "another architecture"),
        (edit_json("tokenizer.json", normalizer={"type": "NFKC"}), "another tokenizer"),
        (retrain, "the same architecture with other weights"),
    ],
)
def test_another_base_is_refused(
    tiny_base: Base, saved: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    other = other_base(tiny_base, tmp_path / "base", change)
    with pytest.raises(MismatchError, match=words) as caught:
        load_adapter(saved, other)
    for part in (tiny_base.name, "other", str(tiny_base.fingerprint), str(other.fingerprint)):
        assert part in str(caught.value)


def test_architecture_and_tokenizer_are_never_allowed(tiny_base: Base, saved: Path, tmp_path: Path) -> None:
    def both(folder: Path) -> None:
        edit_json("config.json", rms_norm_eps=0.5)(folder)
        edit_json("tokenizer.json", normalizer={"type": "NFKC"})(folder)

    with pytest.raises(MismatchError, match="another architecture and another tokenizer"):
        load_adapter(saved, other_base(tiny_base, tmp_path / "base", both), allow_mismatch="weights")


def test_other_weights_can_be_allowed_and_every_verdict_says_so(tiny_base: Base, saved: Path, tmp_path: Path) -> None:
    sibling = other_base(tiny_base, tmp_path / "base", retrain)
    guard = load_adapter(saved, sibling, allow_mismatch="weights")
    with attach(sibling, guards=[guard]):
        verdicts = sibling.chat([Message("user", "hi")], max_new_tokens=2).verdicts
    assert len(verdicts) == 2
    assert all("chat template differ" in verdict.reason for verdict in verdicts)
    again = load_adapter(save_adapter(guard, tmp_path / "again"), tiny_base)
    assert not again.config.allow_mismatch
    assert not load_adapter(saved, tiny_base, allow_mismatch="weights").config.allow_mismatch


def test_allow_mismatch_takes_one_word(tiny_base: Base, saved: Path) -> None:
    for value in (True, "all"):
        with pytest.raises(InputError, match="'weights' or None"):
            load_adapter(saved, tiny_base, allow_mismatch=value)


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), "has no safeside_config.json"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), "has no adapter.safetensors; found nothing"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x00" * 100), "cannot be read"),
        (
            lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-1]),
            "truncated",
        ),
        (lambda folder: rewrite(folder, head__linear__weight=torch.zeros(1, 3)), r"shape \(1, 3\).*expects \(1, 64\)"),
        (lambda folder: rewrite(folder, head__linear__weight=None), "shape None"),
        (lambda folder: rewrite(folder, extra=torch.zeros(1)), "does not have: extra"),
        (lambda folder: rewrite(folder, head__linear__bias=torch.tensor([torch.nan])), "NaN or infinity"),
        (lambda folder: rewrite(folder, head__linear__bias=torch.tensor([torch.inf])), "NaN or infinity"),
        (lambda folder: rewrite(folder, head__linear__bias=torch.tensor([1])), "not float32.*int64"),
        (lambda folder: rewrite(folder, head__linear__bias=torch.tensor([0.25])), "checksum"),
        (lambda folder: edit(folder, name="harmless"), "checksum"),
        (lambda folder: edit(folder, kind="pllr"), "Did you mean 'plr'"),
        (lambda folder: edit(folder, kind="hers/own"), "Unknown adapter kind 'hers/own'"),
        (lambda folder: edit(folder, colour="red"), "colour"),
        (lambda folder: edit(folder, layers=[99]), "layers must lie in 0..3"),
        (lambda folder: edit(folder, bottleneck=10**12), "bottleneck"),
        (lambda folder: edit(folder, format=2), "format 2.*reads formats 1 to 1. Update"),
        (lambda folder: edit(folder, format=0), "format 0"),
        (lambda folder: edit(folder, format="1"), "format '1'"),
        (lambda folder: edit(folder, format=None), "format None"),
        (lambda folder: (folder / CONFIG_FILE).write_text(""), "not a valid configuration"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not a valid configuration"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[1]"), "not a valid configuration"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{}"), "not a valid configuration.*format"),
        (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe"), "not a valid configuration"),
    ],
)
def test_damage_is_a_format_error(
    tiny_base: Base, folder: Path, damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=words):
        load_adapter(folder, tiny_base)
    with pytest.raises(FormatError, match=words):
        pull_adapter(str(folder), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("threshold", [float("nan")]), ("threshold", [1.5]), ("scale", [0.0]), ("bias", [float("inf")]), ("bias", [])],
)
def test_a_calibration_that_would_never_flag_is_refused(folder: Path, field: str, value: object) -> None:
    calibration = json.loads((folder / CONFIG_FILE).read_text())["calibration"]
    edit(folder, calibration={**calibration, field: value})
    with pytest.raises(FormatError, match="calibration"):
        read_config(folder)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.flag,))


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("file", [WEIGHTS_FILE, "adapter.bin", "pytorch_model.pt", CONFIG_FILE])
def test_a_pickle_is_never_read(
    tiny_base: Base, folder: Path, tmp_path: Path, write: Callable[..., None], file: str
) -> None:
    flag = tmp_path / "flag"
    if file != CONFIG_FILE:
        (folder / WEIGHTS_FILE).unlink()
    with (folder / file).open("wb") as handle:
        write(Payload(flag), handle)
    words = r"a pickle is never loaded|can run code and is never read|not a valid configuration"
    with pytest.raises(FormatError, match=words):
        load_adapter(folder, tiny_base)
    assert not flag.exists()
    pickle.loads(pickle.dumps(Payload(flag)))
    assert flag.exists(), "the payload would have worked"


@settings(max_examples=150, derandomize=True)
@given(
    file=st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255) | st.none(),
)
def test_flipped_or_lost_bytes_never_pass(
    session_base: Base, saved: Path, file: str, place: float, byte: int | None
) -> None:
    """One byte changed, or (None) everything from it on lost: the same adapter, or a FormatError, and nothing else."""
    content = bytearray((saved / file).read_bytes())
    index = int(place * len(content))
    content[index:] = b"" if byte is None else bytes([byte]) + content[index + 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(saved, Path(scratch) / "harm"))
        (copy / file).write_bytes(content)
        try:
            loaded = load_adapter(copy, session_base)
        except FormatError:
            return
    expected = load_adapter(saved, session_base)
    assert loaded.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


# ---- names, hub ------------------------------------------------------------------------------------------------------


def test_hub_names_are_downloaded_without_code(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    asked: list[object] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((name, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert find_adapter("org/harm", "v2") == saved
    assert asked == ["org/harm", "v2", list(module.FILES)]  # and no folder of the same kinds of files


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), ValueError("bad name"), OSError("no route")])
def test_names_that_lead_nowhere_are_input_errors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(module, "snapshot_download", download)
    with pytest.raises(InputError, match=f"Cannot load an adapter from 'org/harm'.*{error}"):
        find_adapter("org/harm")


def test_an_unknown_builtin_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no built-in adapter 'builtin:nothing'; expected one of builtin:\{"):
        find_adapter("builtin:nothing")


class StubApi:
    """Records what would go to the hub."""

    calls: list[tuple[str, object]]

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append((repository, (private, exist_ok)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> str:
        self.calls.append((repo_id, (Path(folder_path), sorted(allow_patterns), commit_message)))
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(StubApi, "calls", calls, raising=False)
    monkeypatch.setattr(module, "HfApi", StubApi)
    return calls


def test_push_uploads_the_four_files(hub: list[tuple[str, object]], folder: Path) -> None:
    (folder / "notes.bin").write_bytes(b"secret")
    assert push_adapter(folder, "org/harm", private=True) == "https://hub/commit"
    assert hub == [("org/harm", (True, True)), ("org/harm", (folder, sorted(module.FILES), "safeside harm"))]


def test_push_refuses_a_damaged_folder(hub: list[tuple[str, object]], folder: Path) -> None:
    edit(folder, name="other")
    with pytest.raises(FormatError):
        push_adapter(folder, "org/harm")
    assert hub == []


def test_pull_copies_the_four_files(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    (folder / "extra.py").write_text("print()")
    copy = pull_adapter(str(folder), tmp_path / "new" / "copy")
    assert sorted(file.name for file in copy.iterdir()) == sorted(WRITTEN)
    assert load_adapter(copy, tiny_base).config.name == "harm"
    with pytest.raises(InputError, match="exists already"):
        pull_adapter(str(folder), copy)


def test_the_record_of_rows_goes_where_the_adapter_goes(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    """And not with another adapter that is saved over it."""
    save_learnt(folder, [Example((Message("user", "how?"),), (0.0,))])
    copies = [pull_adapter(str(folder), tmp_path / "pulled")]
    copies.append(copy_adapter(folder, tmp_path / "copied", read_config(folder), {}))
    copy_adapter(folder, folder, read_config(folder), {})
    assert [len(load_learnt(copy)) for copy in (*copies, folder)] == [1, 1, 1]
    save_adapter(load_adapter(folder, tiny_base), folder, tiny_base)
    assert load_learnt(folder) is None


def test_a_copy_has_the_same_weights_under_another_configuration(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    """In a new folder, and in the adapter's own."""
    before = load_file(folder / WEIGHTS_FILE)
    config = read_config(folder).model_copy(update={"name": "other"})
    for target in (tmp_path / "copy", folder):
        assert copy_adapter(folder, target, config, {"why": "a test"}) == target
        assert load_adapter(target, tiny_base).config == config
        found = load_file(target / WEIGHTS_FILE)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        stamp = json.loads((target / "provenance.json").read_text())
        assert (stamp["dataset"], stamp["why"]) == ("none", "a test")
        assert sorted(file.name for file in target.iterdir()) == sorted(WRITTEN)
    edit(folder, name="spoilt")
    with pytest.raises(FormatError, match="checksum"):
        copy_adapter(folder, tmp_path / "more", config, {})
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("step", range(14))
def test_a_copy_in_place_killed_at_any_step_is_the_old_adapter_or_the_new_one(
    tiny_base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save_learnt(folder, [Example((Message("user", "how?"),), (0.0,))])
    before = read_config(folder)
    after = before.model_copy(update={"name": "other"})
    with monkeypatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(KilledError):
            copy_adapter(folder, folder, after, {"why": "a test"})
    found = load_adapter(folder, tiny_base).config
    assert found == (before if step < 2 else after)  # the second step is the one that counts
    assert ("why" in read_provenance(folder)) == (found == after)
    assert len(load_learnt(folder)) == 1
    copy_adapter(folder, folder, after, {})
    assert load_adapter(folder, tiny_base).config == after


@pytest.mark.parametrize("step", range(12))
def test_a_save_over_an_adapter_killed_at_any_step_is_the_old_one_or_the_new_one(
    tiny_base: Base, folder: Path, random_guard: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The old one's record of learnt rows goes with it."""
    save_learnt(folder, [Example((Message("user", "how?"),), (0.0,))])
    before, guard = read_config(folder), random_guard(tiny_base, labels=("other",))
    with monkeypatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(KilledError):
            save_adapter(guard, folder, tiny_base)
    found = load_adapter(folder, tiny_base).config
    assert found.labels in (before.labels, ("other",))
    assert (load_learnt(folder) is None) == (found.labels == ("other",))
    save_adapter(guard, folder, tiny_base)
    assert load_adapter(folder, tiny_base).config.labels == ("other",)
    assert {file.name for file in folder.iterdir() if file.is_file()} == set(WRITTEN)


def test_a_copy_of_what_has_changed_meanwhile_is_refused(
    tiny_base: Base, folder: Path, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    """A promise about the scores of other weights would be none."""
    loaded, config = module.read_checksum(folder), read_config(folder)
    save_adapter(random_guard(tiny_base, labels=("other",)), folder, tiny_base)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(InputError, match="has changed since this run began"):
            copy_adapter(folder, target, config, {}, loaded=loaded)
    assert load_adapter(folder, tiny_base).config.labels == ("other",)
    assert not (tmp_path / "new" / "safeside_config.json").exists()


def test_a_card_tells_that_a_rate_is_each_labels_own(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    for labels, told in ((("a",), "5% on validation data"), (("a", "b"), "5% under each label on validation data")):
        guard = random_guard(tiny_base, labels=labels)
        n = len(labels)
        guard.set_calibration(Calibration(scale=(1.0,) * n, bias=(0.0,) * n, threshold=(0.5,) * n))
        card = (save_adapter(guard, tmp_path / str(n), tiny_base) / "README.md").read_text()
        assert f"at a false-positive rate of {told} |" in card


def test_what_could_not_be_loaded_is_not_written(
    tiny_base: Base, folder: Path, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    broken = read_config(folder).model_copy(update={"preset": "balanced"})
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ConfigError, match="preset 'balanced' is in none of the modes"):
            copy_adapter(folder, target, broken, {})
    guard = random_guard(tiny_base)
    guard.config = broken
    with pytest.raises(ConfigError, match="preset 'balanced' is in none of the modes"):
        save_adapter(guard, tmp_path / "new", tiny_base)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_weights_may_be_read_by_whom_an_ordinary_file_may(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    folder = save_adapter(random_guard(tiny_base), tmp_path / "harm", tiny_base)
    save_learnt(folder, [])
    copy_adapter(folder, tmp_path / "copy", read_config(folder), {})
    for place in (folder, tmp_path / "copy"):
        assert len({file.stat().st_mode for file in place.iterdir()}) == 1


def test_files_of_adapters_without_groups_do_not_tell_of_them(session_base: Base, tmp_path: Path) -> None:
    """What was written and hashed before there were any is as it was; groups come back as they were."""
    plain, grouped = (make_config(session_base, width=64, query_group=size) for size in (1, 2))
    assert "query_group" not in plain.model_dump_json()
    folder = save_adapter(create_adapter(session_base, grouped, seed=1), tmp_path / "grouped", session_base)
    assert read_config(folder).query_group == 2
    assert load_adapter(folder, session_base).config == grouped.model_copy(update={"base": read_config(folder).base})
