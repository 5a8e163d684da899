"""Columns of an offline teacher, from what servers answer and what others have stored: a function for each source.

Each returns a :class:`Served`: ``{"teacher_ids": int32 (L, K), "teacher_logprobs": float32 (L, K)}``, where row i is
the distribution of token i + 1, −1 and 0.0 are padding, and a row that is not known is all −1. As columns of a data set
it is what :class:`fusedkd.integrations.offline.OfflineTeacherCollator` pads; ``served.topk()`` is the teacher of a
loss. The line that says what was read, ``served.report``, goes to the logger "fusedkd.served" as well.

Rows that do not go with the tokens are refused: by the tokens' own log-probabilities where the source gives them, and
by how probable the tokens are under the rows, compared with one row off.
"""

from fusedkd.integrations.served.caches import from_axolotl, from_columns, from_distillkit
from fusedkd.integrations.served.files import from_llama_cpp, from_parquet, from_safetensors
from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.texts import from_openai
from fusedkd.integrations.served.tokens import from_sglang, from_tensorrt_llm, from_tinker, from_trl, from_vllm

__all__ = [
    "Served",
    "from_axolotl",
    "from_columns",
    "from_distillkit",
    "from_llama_cpp",
    "from_openai",
    "from_parquet",
    "from_safetensors",
    "from_sglang",
    "from_tensorrt_llm",
    "from_tinker",
    "from_trl",
    "from_vllm",
]
