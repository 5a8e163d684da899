"""Which part of the package may import which: an arrow goes from the application to the library, never back."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fusedkd"


def imported(file: Path) -> set[str]:
    """Names of modules, also of those that are imported within a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import, which this test does not follow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_the_library_does_not_import_the_application() -> None:
    application = PACKAGE / "distilbert"
    library = [file for file in PACKAGE.rglob("*.py") if application not in file.parents]
    assert len(library) > 20
    wrong = {file.name for file in library for name in imported(file) if name.startswith("fusedkd.distilbert")}
    assert wrong == set()
    assert any(name.startswith("fusedkd.integrations") for name in imported(application / "trainer.py"))
