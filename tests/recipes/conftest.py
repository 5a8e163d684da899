"""The tokenizers, text and teacher of the driver's tests, and files of GLUE.

This folder is no package, which would hide the one that it tests.
"""

# ruff: noqa: F401 (fixtures)

import gc

import pytest
from distilbert.conftest import gpt2_tokenizer, own_caches, roberta_tokenizer, teacher_folder, text_files, tokenizer
from glue_files import glue


@pytest.fixture(scope="session", autouse=True)
def collected() -> None:
    """Every training ends with `gc.collect`, which takes a quarter of a second to look at what the imports made."""
    gc.collect()
    gc.freeze()
