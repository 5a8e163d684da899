"""Files in the layout of GLUE's download, small enough for tests."""

import gzip
from pathlib import Path

import pytest
from distilbert.conftest import sentences


def labelled(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences that begin with a cat or a dog, and with which."""
    texts = (text.replace("cat", "bird").replace("dog", "house") for text in sentences(count, seed))
    return [
        (f"{'dog' if (i * 7 + seed) % 3 else 'cat'} {text}", int((i * 7 + seed) % 3 > 0))
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def glue(tmp_path) -> Path:
    """Files in the layout of GLUE's download."""
    folder = tmp_path / "glue"
    for name in ("SST-2", "CoLA", "RTE", "STS-B"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 96), ("dev", 40)):
        rows = labelled(count, count)
        sst2 = ["sentence\tlabel", *(f"{text} \t{label}" for text, label in rows)]
        with gzip.open(folder / "SST-2" / f"{split}.tsv.gz", "wt") as file:
            file.write("\n".join(sst2) + "\n")
        cola = [f"src\t{label}\t{'' if label else '*'}\t{text}" for text, label in rows]
        cola[1] = 'src\t0\t*\t"the cat sees'
        cola[2] = "src\t1\t\tnull"
        (folder / "CoLA" / f"{split}.tsv").write_text("\n".join(cola) + "\n")
        names = ["entailment", "not_entailment"]
        rte = [f"{i}\t{text}\t{text[:9]}\t{names[label]}" for i, (text, label) in enumerate(rows)]
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rte]) + "\n")
        stsb = [f"{i}\tg\tf\t{text}\tthe cat\t{4.5 * label:.3f}" for i, (text, label) in enumerate(rows)]
        head = "index\tgenre\tfilename\tsentence1\tsentence2\tscore"
        (folder / "STS-B" / f"{split}.tsv").write_text("\n".join([head, *stsb]) + "\n")
    return folder
