"""What the site has besides the pages of docs/: README.md as its front page, the pictures of benchmarks/results, links
to files of the repository, and links where docstrings name other objects.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent
PICTURES = Path("benchmarks/results")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
IN_REFERENCE = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))


def on_files(files: Any, config: Any) -> None:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to pages and pictures as the site has them; to other files where the repository is, if that is known."""
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"

    def mended(link: re.Match[str]) -> str:
        target, anchor = (folder / link[1]).resolve(), link[2] or ""
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[1]} does not exist")
        path = target.relative_to(ROOT)
        if path.parts[0] == "docs":
            return f"]({path.relative_to('docs').as_posix()}{anchor})"
        if path.parent == PICTURES and path.suffix == ".png":
            return f"](results/{path.name})"
        return f"]({config.repo_url.rstrip('/')}/blob/HEAD/{path.as_posix()}{anchor})" if config.repo_url else "][0]"

    return re.sub(r"\[([^\]]*)\]\[0\]", r"\1", LINK.sub(mended, markdown))


class Docstrings(griffe.Extension):
    """Docstrings as their reader should see them: Sphinx's roles are links where the reference has the object, else
    names; the options that several losses share stand where ``{options}`` is, and in the signature.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(self._name, obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if "options" not in func.parameters or "{options}" not in getattr(func.docstring, "value", ""):
            return
        options, defaults = func.package["losses.options.KDOptions"], func.package["losses.options.DEFAULTS"].value
        described = textwrap.indent(ROLE.sub(self._name, options.docstring.value), "    ")
        func.docstring.value = func.docstring.value.replace("    {options}", described)
        del func.parameters["options"]
        for name, default in zip(defaults.keys, defaults.values, strict=True):
            of = options.members[str(name).strip("'\"")]
            keyword = griffe.ParameterKind.keyword_only
            func.parameters.add(griffe.Parameter(of.name, annotation=of.annotation, kind=keyword, default=default))

    @staticmethod
    def _name(role: re.Match[str]) -> str:
        return f"[`{role[1]}`][{role[1]}]" if role[1] in IN_REFERENCE else f"`{role[1]}`"
