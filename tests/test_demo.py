"""The demo from end to end on the built-in base, small: it trains, scores, chats and writes its page."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from safeside import Message, cli, load_adapter, load_base
from safeside.demo import PROMPTS, run_demo
from safeside.guards.score import judge

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (files("safeside.builtin") / "adapters" / "harm" / "adapter.safetensors").is_file(),
        reason="the built-in adapters are not there: make builtin",
    ),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    """The folder that it wrote, what it returned, and what it printed."""
    output, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = run_demo(output, quick=True)
    return output, result, printed.getvalue()


def test_the_figures_are_there(demo: tuple[Path, dict[str, object], str]) -> None:
    _, result, _ = demo
    json.dumps(result, allow_nan=False)
    assert 0.4 < result["guard_auroc"]["value"] <= 1
    assert 0.4 < result["tfidf_auroc"]["value"] <= 1
    assert result["n_test"] == 100
    assert 0 < result["train_seconds"] < result["seconds"]
    rates = {(row["strength"], row["metric"]): row["value"] for row in result["refusal"]}
    assert len(rates) == 4  # quick: strengths 0 and 1
    assert rates["1", "refusal_rate_harmful"] > rates["0", "refusal_rate_harmful"]


def test_the_tables_are_printed(demo: tuple[Path, dict[str, object], str]) -> None:
    printed = re.sub(r"\s+", " ", demo[2])
    for title in ("templates and topics were never seen", "Scores of five prompts", "several strengths", "by strength"):
        assert title in printed
    assert "TF-IDF + logistic regression" in printed
    assert "set by the guard" in printed
    assert "passed" in printed or "FLAGGED" in printed


def test_the_page_is_written(demo: tuple[Path, dict[str, object], str]) -> None:
    output, result, _ = demo
    assert result["report"] == str(output / "report.html")
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page
    for prompt in PROMPTS:
        assert prompt.replace("'", "&#39;") in page


def test_the_guard_can_be_loaded(demo: tuple[Path, dict[str, object], str]) -> None:
    base = load_base("builtin")
    guard = load_adapter(str(demo[1]["guard"]), base)
    ((verdict,),) = judge(base, [guard], [[Message("user", PROMPTS[0])]])
    assert 0 <= verdict.score <= 1
    assert verdict.task == "demo-guard"


def test_the_command_prints_what_the_demo_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(replaced: list[object]) -> Callable[..., dict[str, object]]:
        def run(output: Path, *, quick: bool, show: bool) -> dict[str, object]:
            replaced.append((output, quick, show))
            return {"n_test": 3}

        return run

    calls: list[object] = []
    monkeypatch.setattr("safeside.demo.run_demo", fake(calls))
    for words in (["--quick", "--json"], []):
        monkeypatch.setattr("sys.argv", ["safeside", "demo", "--output", str(tmp_path), *words])
        with pytest.raises(SystemExit):
            cli.main()
    assert calls == [(tmp_path, True, False), (tmp_path, False, True)]
    assert json.loads(capsys.readouterr().out) == {"n_test": 3}
