"""The tokenizers, text and teacher of the driver's tests, and files of GLUE.

This folder is no package, which would hide the one that it tests.
"""

# ruff: noqa: F401 (fixtures)

import gc

import pytest
from distilbert.conftest import gpt2_tokenizer, own_caches, roberta_tokenizer, teacher_folder, text_files, tokenizer
from glue_files import glue


@pytest.fixture(autouse=True, scope="session")
def frozen_modules():
    """Each training ends with a garbage collection, whose time is that of looking at everything imported so far."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
