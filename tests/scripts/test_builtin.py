"""What ships with the package says where it comes from."""

import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest

# Under a name of its own: scripts/pretrain has a rows.py too.
SPEC = importlib.util.spec_from_file_location(
    "builtin_rows", Path(__file__).parents[2] / "scripts" / "builtin" / "rows.py"
)
rows = importlib.util.module_from_spec(SPEC)
sys.modules["builtin_rows"] = rows
SPEC.loader.exec_module(rows)

ADAPTERS = Path(str(files("safeside.builtin"))) / "adapters"
SOURCES = {"harm": rows.GUARD_SOURCES, "refuse": rows.KEPT_SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_cards_credit_every_source_with_its_licence(name: str) -> None:
    card = (ADAPTERS / name / "README.md").read_text()
    stamp = json.loads((ADAPTERS / name / "provenance.json").read_text())
    for source in SOURCES[name]:
        credit = rows.credit_of(source.file)
        (line,) = [line for line in card.splitlines() if credit in line]
        assert source.licence in line
        assert "training and" in line
    assert rows.OWN in card
    for fact in ("licence", "limits"):
        assert f"| {fact} | {stamp[fact]} |" in card
    assert any(key.startswith("validation, ") for key in stamp)
    assert "peak_bytes" not in stamp


def test_rows_are_counted_by_source_and_split() -> None:
    file = "aegis/v2_sample900_train.jsonl.gz"
    train = [{"source": file}, {"source": file}, {"prompt": "own"}]
    facts = rows.data_facts(train, [{"source": file}], [rows.Source(file, "CC-BY-4.0", 9)])
    assert facts == {
        "data, NVIDIA, Aegis AI Content Safety Dataset 2.0": "2 training and 1 validation rows, texts unchanged; "
        "CC-BY-4.0; " + rows.CREDITS["aegis"],
        "data, written for safeside": "1 training and 0 validation rows, texts unchanged; Apache-2.0; " + rows.OWN,
    }
