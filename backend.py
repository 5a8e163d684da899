"""The build backend: setuptools', but it builds against the torch that is installed where fusedkd is going to be.

Under build isolation a build sees nothing but the requirements of pyproject.toml, and a torch among them would be a
second one, gigabytes of it. The libraries take headers and names of symbols from torch, the same from every one since
2.11: the build finds the installed one outside of its isolation, and requires another only where there is none.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not below)

OLDEST = (2, 11)  # the stable ABI that csrc is written in
FIND = "import importlib.util; found = importlib.util.find_spec('torch'); print(found.origin if found else '')"


def torch_folder() -> Path | None:
    """The folder of a torch that is new enough: that which this Python imports, or would without build isolation."""
    here = find_spec("torch")
    origin = here.origin if here else None
    if origin is None:
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        run = subprocess.run([sys.executable, "-c", FIND], env=outside, cwd=sys.prefix, capture_output=True, text=True)
        origin = run.stdout.strip()
    version = Path(origin).parent / "version.py" if origin else None
    if version is None or not version.is_file():
        return None
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return version.parent if found and (int(found[1]), int(found[2])) >= OLDEST else None


def missing() -> list[str]:
    return [] if torch_folder() else ["torch>={}.{}".format(*OLDEST)]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing()]
