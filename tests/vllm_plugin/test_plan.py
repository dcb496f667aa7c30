"""What an engine is started with, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from command_line import Ran
from safeside import Adapter, Base, save_adapter
from safeside.cli import main
from safeside.errors import (
    ConfigError,
    InputError,
    MismatchError,
    MissingExtraError,
    UnsupportedError,
)
from safeside.vllm_plugin import launch, plan
from safeside.vllm_plugin.kept import WorkerExtension
from safeside.vllm_plugin.plan import CONFIG_KEY, Plan, check_version, plan_engine, read_engine_config, spare_ids
from tiny import BOS, EOS, N_TOKENS, PAD, SYSTEM, VOCABULARY, make_tiny

Make = Callable[..., Adapter]


@pytest.fixture(scope="module")
def folders(
    session_base: Base, random_guard: Make, random_aligner: Make, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Saved adapters by name."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        "harm": random_guard(session_base, "harm", labels=("harm", "hate")),
        "probe": random_guard(session_base, "probe", kind="plr"),
        "pooled": random_guard(session_base, "pooled", readout="attention"),
        "refuse": random_aligner(session_base),
        "top": random_aligner(session_base, "top", kind="toplayers"),
    }
    return {name: save_adapter(adapter, root / name) for name, adapter in made.items()}


@pytest.fixture(scope="module")
def planned(session_base: Base, folders: dict[str, Path]) -> Plan:
    return plan_engine(session_base.folder, [folders["harm"], folders["probe"]], folders["refuse"])


def test_options_hold_all_that_the_engine_needs(planned: Plan, folders: dict[str, Path], session_base: Base) -> None:
    options = planned.engine_options()
    assert options["model"] == str(session_base.folder)
    assert options["hf_overrides"] == {"architectures": ["SafesideLlamaForCausalLM"]}
    config = read_engine_config(options["additional_config"])
    assert [entry.config.name for entry in config.adapters] == ["harm", "probe", "refuse"]
    assert config == planned.config
    assert config.thresholds == {"harm": 0.5, "probe": 0.5}
    assert len(config.slots) == 1 + 3 + 1
    assert all(N_TOKENS <= slot < VOCABULARY for slot in config.slots)
    flags = dict(zip(planned.serve_flags()[::2], planned.serve_flags()[1::2], strict=True))
    assert json.loads(flags["--additional-config"]) == options["additional_config"]
    assert flags["--logits-processors"].split(":")[1].removeprefix("Strengths_").isalnum()
    assert flags["--worker-extension-cls"] == options["worker_extension_cls"]
    module, _, name = options["worker_extension_cls"].rpartition(".")
    assert vars(import_module(module))[name] is WorkerExtension


def test_an_engine_without_guards_keeps_no_scores(session_base: Base, folders: dict[str, Path]) -> None:
    alone = plan_engine(session_base.folder, aligner=folders["refuse"])
    assert "worker_extension_cls" not in alone.engine_options()
    assert "--worker-extension-cls" not in alone.serve_flags()


def test_other_weights_are_another_key_of_the_compile_cache(
    planned: Plan, session_base: Base, random_guard: Make, tmp_path: Path
) -> None:
    other = save_adapter(random_guard(session_base, "harm", seed=9, labels=("harm", "hate")), tmp_path / "other")
    entries = planned.config.adapters[0], plan_engine(session_base.folder, [other]).config.adapters[0]
    assert entries[0].config == entries[1].config
    assert entries[0].content != entries[1].content


def test_what_does_not_fit_is_refused(session_base: Base, folders: dict[str, Path], tmp_path: Path) -> None:
    base = session_base.folder
    other = make_tiny("llama", tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(MismatchError, match="another architecture"):
        plan_engine(other, [folders["harm"]])
    with pytest.raises(UnsupportedError, match="kind 'toplayers'"):
        plan_engine(base, [], folders["top"])
    with pytest.raises(UnsupportedError, match="attention read-out"):
        plan_engine(base, [folders["pooled"]])
    with pytest.raises(InputError, match="Swap the options"):
        plan_engine(base, [folders["refuse"]])
    with pytest.raises(InputError, match="names must differ"):
        plan_engine(base, [folders["harm"], folders["harm"]])
    with pytest.raises(InputError, match="at least one guard or aligner"):
        plan_engine(base)
    with pytest.raises(InputError, match="asks guard 'nobody'"):
        plan_engine(base, [folders["harm"]], folders["refuse"], strength={"policy": "ramp", "guard": "nobody"})
    with pytest.raises(InputError, match="no token <\\|nothing\\|>"):
        plan_engine(base, [folders["harm"]], spare_tokens=["<|nothing|>"])


def test_a_pooling_engine_takes_guards_alone_and_no_ids(folders: dict[str, Path], session_base: Base) -> None:
    planned = plan_engine(session_base.folder, [folders["harm"], folders["probe"]], pools="token_classify")
    options = planned.engine_options()
    assert {name: options.get(name) for name in ("runner", "convert", "logits_processors")} == {
        "runner": "pooling", "convert": "embed", "logits_processors": None,
    }  # fmt: skip
    assert read_engine_config(options["additional_config"]) == planned.config
    assert (planned.config.slots, planned.config.pools) == ((), "token_classify")
    with pytest.raises(UnsupportedError, match="A pooling engine is not served"):
        planned.serve_flags()
    for guards in ([folders["harm"]], []):
        with pytest.raises(InputError, match="takes guards alone, no aligner"):
            plan_engine(session_base.folder, guards, folders["refuse"], pools="classify")
    with pytest.raises(InputError, match="'token_classify' or 'classify'"):
        plan_engine(session_base.folder, [folders["harm"]], pools="embed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="would not be read"):
        plan_engine(session_base.folder, [folders["harm"]], pools="classify", spare_tokens=["<|system|>"])


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_another_architecture_is_refused(family: str, tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"called \.\.\.ForCausalLM"):
        plan_engine(tiny_folder(family), ["builtin:harm"])


def test_tokens_in_reserve_and_those_that_are_named_carry_scores(tmp_path: Path, session_base: Base) -> None:
    folder = shutil.copytree(session_base.folder, tmp_path / "reserved")
    assert spare_ids(folder)[:2] == [VOCABULARY - 1, VOCABULARY - 2]
    tokenizer = session_base.tokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|reserved_{index}|>" for index in range(VOCABULARY - N_TOKENS)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert spare_ids(folder)[:2] == [VOCABULARY - 1, VOCABULARY - 2]
    assert spare_ids(folder, ["<|system|>"])[0] == SYSTEM
    assert {PAD, BOS} <= set(spare_ids(folder))
    assert EOS not in spare_ids(folder, ["<|eos|>"])


@pytest.mark.parametrize("stops", [SYSTEM, [EOS, SYSTEM]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_ends_an_answer_carries_no_score(
    name: str, stops: int | list[int], tmp_path: Path, session_base: Base
) -> None:
    """An instruction model has ends beside its tokenizer's, and they may be called reserved."""
    folder = shutil.copytree(session_base.folder, tmp_path / "stops")
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**values, "eos_token_id": stops}), encoding="utf-8")
    assert SYSTEM in spare_ids(session_base.folder, ["<|system|>"])
    assert not {SYSTEM, EOS} & set(spare_ids(folder, ["<|system|>"]))


def test_a_vocabulary_without_free_ids_needs_names() -> None:
    """The built-in base has none but those that begin and fill texts: one score, and no room for the strength."""
    config = plan_engine("builtin", ["builtin:harm"], "builtin:refuse").config
    assert (len(config.slots), config.tells_strength) == (2, False)
    config = plan_engine("builtin", ["builtin:harm"], "builtin:refuse", spare_tokens=["<|system|>"]).config
    assert (len(config.slots), config.tells_strength) == (3, True)


@pytest.mark.parametrize("installed", ["0.31.4", "0.33.0", "1.32.0", "dev"])
def test_another_release_of_vllm_is_refused(installed: str) -> None:
    with pytest.raises(UnsupportedError, match=r"tested with 0\.32"):
        check_version(installed)
    check_version("0.32.0+cpu")


def test_an_engine_without_its_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="plan_engine"):
        read_engine_config({})
    with pytest.raises(ConfigError, match="not valid"):
        read_engine_config({CONFIG_KEY: {"adapters": []}})


def test_the_command_is_printed_or_run(
    folders: dict[str, Path], session_base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--engine", "vllm", "--base", str(session_base.folder), "--guard", str(folders["harm"])]
    monkeypatch.setattr("sys.argv", ["safeside", *words, "--vllm-flag=--max-model-len=64", "--print-command"])
    monkeypatch.setattr(launch, "installed_version", lambda: "0.32.0")
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "vllm.entrypoints.openai.api_server" in printed
    assert f"--served-model-name {session_base.folder}" in printed  # as it was given, not where it lies
    assert printed.rstrip().endswith("--max-model-len=64")


@pytest.mark.parametrize(
    "flag",
    [
        '--hf-overrides={"rope_parameters": {}}', "--hf-overrides", "--hf_overrides={}", "--hf-overrides.x=1",
        "--hf-ov={}", "--additional_config.safeside.strength=0", "--logits-processors=a.b:C", "--middleware=a.b",
        "--model=other", "--tokenizer=other", "--logprobs-mode=processed_logprobs", "--config=flags.yaml",
        "--worker-extension-cls=a.b", "--worker_ext=a.b",
    ],
)  # fmt: skip
def test_flags_that_could_take_the_guards_out_are_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two flags of a name vLLM takes the last."""
    monkeypatch.setattr(launch, "installed_version", lambda: "0.32.0")
    with pytest.raises(InputError, match="would be read in place of what serves guards"):
        launch.vllm_command(launch.VllmOptions("builtin", ["builtin:harm"], more=["--max-model-len", "64", flag]))


def test_an_engine_in_the_servers_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real server of this kind scores of structured output are lost."""
    monkeypatch.setattr(launch, "installed_version", lambda: "0.32.0")
    options = launch.VllmOptions("builtin", ["builtin:harm"])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(InputError, match=r"MULTIPROCESSING=0 is set: .* Unset it"):
        launch.vllm_command(options)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert launch.vllm_command(options)


def test_other_flags_are_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "installed_version", lambda: "0.32.0")
    more = ["--model-impl=auto", "--tokenizer-mode=slow", "--logits-processor-pattern=x", "--config-format=hf", "-O0"]
    command = launch.vllm_command(launch.VllmOptions("builtin", ["builtin:harm"], more=more))
    assert command[-len(more) :] == more
    assert command[command.index("--served-model-name") + 1] == "builtin"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guard", "builtin:harm"], "for --engine vllm"),
        (["--strength", "0.5"], "for --engine vllm"),
        (["--print-command"], "for --engine vllm"),
        ([], "--policy FILE"),
        (["--engine", "vllm", "--policy", "p.yaml"], "embedded server"),
        (["--engine", "vllm", "--max-rows", "32"], "--max-rows would not be read"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["safeside", "serve", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert said in capsys.readouterr().err


def test_every_option_that_vllm_does_not_read_is_named(run: Callable[..., Ran]) -> None:
    numbers = ("drain", "max-rows", "max-waiting", "max-judged", "max-tokens", "deadline", "guard-timeout", "max-body")
    words = ["--audit=sqlite:///a.db", "--device=cuda", *(f"--{name}=4096" for name in (*numbers, "judge-every"))]
    ended = run("serve", "--engine", "vllm", *words)
    assert ended.code
    assert all(word.partition("=")[0] in ended.err for word in words), ended.err
    assert "--host" not in ended.err


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise plan.PackageNotFoundError(name)

    monkeypatch.setattr(plan, "version", missing)
    with pytest.raises(MissingExtraError, match=r"safeside\[vllm\]"):
        plan.installed_version()
