"""Write or check everything in the documents that is generated.

    python scripts/docs.py --write    # after a change of source, command line, recipe fields or results
    python scripts/docs.py --check    # exit 1 and name what is stale

Whole pages are docs/reference/*.md.  Inside other pages a part stands between ``<!-- generated:NAME -->`` and
``<!-- /generated:NAME -->``.  Tables of figures are benchmarks/tables.py's, which is run with the same option.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from docgen.api import api_page, modules_page
from docgen.commands import cli_page
from docgen.errors import errors_page
from docgen.facts import builtin_facts, refused_facts
from docgen.models import adapter_config_page, gene_page, policy_page, recipe_page
from docgen.source import ROOT
from docgen.supported import supported_page

PAGES = {
    "docs/reference/api.md": api_page,
    "docs/reference/modules.md": modules_page,
    "docs/reference/cli.md": cli_page,
    "docs/reference/recipe.md": recipe_page,
    "docs/reference/adapter-config.md": adapter_config_page,
    "docs/reference/gene.md": gene_page,
    "docs/reference/policy.md": policy_page,
    "docs/reference/errors.md": errors_page,
    "docs/reference/supported.md": supported_page,
}
PARTS = {"builtin": builtin_facts, "refused": refused_facts}
FIGURES = ROOT / "benchmarks" / "tables.py"
_PART = re.compile(r"(<!-- generated:(\S+) -->\n).*?(<!-- /generated:\2 -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; the exit code is 1 when something is stale."""
    parser = argparse.ArgumentParser(description="Write or check the generated documents.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_true", help="write what is stale")
    group.add_argument("--check", action="store_true", help="name what is stale, exit 1")
    is_check = parser.parse_args(arguments).check
    stale = {path: text for path, text in generated().items() if not path.is_file() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is stale: run make docs" if is_check else f"wrote {path.relative_to(ROOT)}")
        if not is_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    figures = run_figures("--check" if is_check else "--write")
    return figures or int(bool(stale) and is_check)


def generated() -> dict[Path, str]:
    """Every file with generated text, and what it should hold."""
    files = {ROOT / name: make() for name, make in PAGES.items()}
    texts = {path: path.read_text(encoding="utf-8") for path in written_pages()}
    return files | {path: _PART.sub(_filled, text) for path, text in texts.items() if "<!-- generated:" in text}


def written_pages() -> list[Path]:
    """The pages that are written by hand, parts of them perhaps generated."""
    whole = {ROOT / name for name in PAGES}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if page not in whole]


def _filled(match: re.Match[str]) -> str:
    return f"{match[1]}{PARTS[match[2]]()}\n{match[3]}"


def run_figures(option: str) -> int:
    """Let benchmarks/tables.py do the same for the tables of figures."""
    files = [str(path.relative_to(ROOT)) for path in written_pages() if "<!-- table:" in path.read_text("utf-8")]
    return subprocess.run([sys.executable, str(FIGURES), option, *files], cwd=ROOT).returncode if files else 0


if __name__ == "__main__":
    raise SystemExit(main())
