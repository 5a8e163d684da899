"""The text of the demonstration: English that every Python installation has."""

import ast
import sysconfig
from pathlib import Path


def documentation() -> list[str]:
    """The language reference and the docstrings of the standard library, one document an entry, in a fixed order.

    Docstrings are read from the source; nothing is imported.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "encodings", "idlelib", "lib2to3"}
    documents = [topics[name] for name in sorted(topics)]
    for file in sorted(library.rglob("*.py")):
        if skipped.intersection(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        documents += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in dict.fromkeys(" ".join(d.split()) for d in documents) if len(text) > 80]
