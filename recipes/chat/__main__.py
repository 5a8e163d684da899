"""`python -m recipes.chat --runs runs/online runs/on_policy`: runs of `fusedkd distil` in one table and one picture."""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from fusedkd.integrations.command import UsageError, command_line, option, parse_into
from recipes.chat import report


@dataclass
class ChatOptions:
    runs: list[str] = option([], "output folders of `fusedkd distil`, finished")
    output_dir: str = option("runs/chat-compared", "where table and picture go")


def run(options: ChatOptions) -> None:
    found = {}
    for name in options.runs:
        try:
            found[Path(name).name] = json.loads((Path(name) / "results.json").read_text())
        except (OSError, ValueError):
            raise UsageError(f"--runs {name}: there is no results.json of `fusedkd distil`") from None
    if not found:
        raise UsageError("--runs are missing: output folders of `fusedkd distil`")
    report.write(Path(options.output_dir), found)


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: run(*parse_into([ChatOptions], argv, "python -m recipes.chat")))


if __name__ == "__main__":
    sys.exit(main())
