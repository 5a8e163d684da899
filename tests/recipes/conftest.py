"""The tokenizers, text and teacher of the driver's tests, and files of GLUE.

This folder is no package, which would hide the one that it tests.
"""

# ruff: noqa: F401 (fixtures)

from distilbert.conftest import gpt2_tokenizer, own_caches, roberta_tokenizer, teacher_folder, text_files, tokenizer
from glue_files import glue
