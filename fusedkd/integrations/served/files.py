"""Files of teachers' distributions. Their sizes are checked before anything is allocated, and nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusedkd.integrations.served.caches import from_columns
from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.rows import to_served

MAGIC = b"_logits_"
HEADER = len(MAGIC) + 3 * 4


def from_llama_cpp(path: str | Path, *, top_k: int = 64) -> Iterator[Served]:
    """The file that ``llama-perplexity --kl-divergence-base`` writes: a :class:`Served` with ``input_ids`` for each
    chunk of n_ctx tokens, read as the iterator comes to it.

    Rows are known from n_ctx/2 to n_ctx − 2: the engine scores the second half of each chunk alone. It decoded BOS in
    place of each chunk's first token, if the model has one, but the tokens are those of the text. A row holds 16-bit
    codes u of log p = scale·u + minimum over the whole vocabulary; code 0 stands for everything that is 16 nats or more
    below the best, so it is never listed, and Σp over all codes exceeds 1 (1.015 at 131,072 columns). Codes of the best
    columns are right to 1.2e-4 nats. The temperature is 1.

    Args:
        path: the file. All of its chunks must be there: a run that was interrupted is refused, and one that filled the
            disk, which the engine does not notice.
        top_k: columns of each row.

    Yields:
        ``{"teacher_ids": (n_ctx, K), "teacher_logprobs": (n_ctx, K), "input_ids": (n_ctx,)}``.

    Raises:
        ValueError: naming the file, before anything is read, where its size is not what its header says, and where the
            rows do not go with the tokens.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER or header[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is no file of llama-perplexity --kl-divergence-base: it must begin with {MAGIC!r}")
    context, vocabulary, chunks = (int(n) for n in np.frombuffer(header, "<i4", 3, len(MAGIC)))
    first, width = context // 2, 2 * ((vocabulary + 1) // 2) + 4
    rows = context - 1 - first
    start = HEADER + 4 * chunks * context
    wanted = start + 2 * chunks * rows * width
    if context < 2 or vocabulary < 1 or chunks < 1 or size != wanted:
        raise ValueError(
            f"{path} must have {wanted} bytes, for {chunks} chunks of {context} tokens and {vocabulary} columns, "
            f"not {size}"
        )
    return _chunks(path, chunks, context, vocabulary, start, first, min(top_k, vocabulary))


def _chunks(
    path: Path, chunks: int, context: int, vocabulary: int, start: int, first: int, top_k: int
) -> Iterator[Served]:
    rows, width = context - 1 - first, 2 * ((vocabulary + 1) // 2) + 4
    tokens = np.memmap(path, "<i4", "r", HEADER, (chunks, context))
    codes = np.memmap(path, "<u2", "r", start, (chunks, rows, width))
    for chunk in range(chunks):
        ids = np.full((rows, top_k), -1, np.int64)
        logprobs = np.zeros((rows, top_k), np.float32)
        for r in range(rows):
            scale, minimum = np.array(codes[chunk, r, :4]).view("<f4")
            row = codes[chunk, r, 4 : 4 + vocabulary]
            best = np.argpartition(row, -top_k)[-top_k:]
            best = best[row[best] > 0]
            ids[r, : len(best)], logprobs[r, : len(best)] = best, scale * row[best].astype(np.float32) + minimum
        own = np.array(tokens[chunk])
        if own.min() < 0:
            raise ValueError(f"{path}: chunk {chunk} has the token {own.min()}, and they must be at least 0")
        served = to_served(
            "from_llama_cpp", ids, logprobs, own.astype(np.int64), offset=1, positions=np.arange(first, first + rows)
        )
        yield _with_tokens(served, own)


def from_parquet(path: str | Path, loader: Callable[[dict[str, Any]], Served] = from_columns) -> Iterator[Served]:
    """Rows of a Parquet file, one after the other, each with its ``input_ids`` where the file has them.

    Args:
        path: the file.
        loader: what a row is read with, as a dict of its columns: :func:`from_columns`, or :func:`from_distillkit` and
            :func:`from_axolotl` with their options (``functools.partial``).

    Raises:
        ValueError: naming the file and the row.
    """
    import pyarrow.parquet as pq

    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=16):
        for example in batch.to_pylist():
            try:
                served = loader(example)
            except ValueError as error:
                raise ValueError(f"{path}, row {row}: {error}") from error
            yield _with_tokens(served, example.get("input_ids"))
            row += 1


def from_safetensors(path: str | Path, loader: Callable[[dict[str, Any]], Served] = from_columns) -> Iterator[Served]:
    """A safetensors file of columns: ``(L, K)`` of one sequence or ``(N, L, K)`` of N, with ``input_ids`` ``(L,)`` or
    ``(N, L)``, of any float and integer type; a sequence at a time is read.

    Args:
        path: the file.
        loader: what a sequence is read with, as a dict of its tensors: :func:`from_columns`.

    Raises:
        ValueError: naming the file, where it is none, and where its tensors have no common N.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            deepest = max((len(shape) for shape in shapes.values()), default=0)
            if deepest < 2 or len({shape[0] for shape in shapes.values() if shape}) != 1:
                raise ValueError(f"{path} must hold columns (L, K) or (N, L, K) and input_ids, not {shapes}")
            for n in range(next(iter(shapes.values()))[0] if deepest == 3 else 1):
                here = {name: part[n] if deepest == 3 else part[:] for name, part in slices.items()}
                try:
                    served = loader(here)
                except ValueError as error:
                    raise ValueError(f"{path}, sequence {n}: {error}") from error
                yield _with_tokens(served, here.get("input_ids"))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _with_tokens(served: Served, tokens: Any) -> Served:
    if tokens is not None:
        served["input_ids"] = np.asarray(tokens, np.int32)
    return served
