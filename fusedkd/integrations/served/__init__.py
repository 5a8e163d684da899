"""Columns of the offline teacher, from what servers answer and other projects store: a function for each source."""

from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.texts import from_openai
from fusedkd.integrations.served.tokens import from_sglang, from_vllm

__all__ = ["Served", "from_openai", "from_sglang", "from_vllm"]
