"""`fusedkd COMMAND …`, also `python -m fusedkd COMMAND …`: the commands of the package."""

import sys
from importlib import import_module

COMMANDS = {
    "distil": ("fusedkd.integrations.distil", "a chat model into a smaller one: teacher online, offline or on-policy"),
    "cache": ("fusedkd.integrations.cache_teacher", "a teacher's best tokens at every position of a data set, on disk"),
    "distilbert": ("fusedkd.distilbert.__main__", "a BERT, RoBERTa or GPT-2 into one of fewer layers, from text"),
    "env": ("fusedkd.env", "which backend serves what, and why"),
}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in COMMANDS:
        lines = ["usage: fusedkd COMMAND [options]", *(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())]
        print("\n".join([*lines, "fusedkd COMMAND --help: its options"]))
        if given[:1] in ([], ["-h"], ["--help"]):
            return 0
        print(f"error: there is no command {given[0]}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[given[0]]
    try:
        command = import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fusedkd"):
            raise
        print(f'error: {error.name} is missing: {given[0]} needs pip install "fusedkd[train]"', file=sys.stderr)
        return 2
    if given[0] == "env":
        command.main()
        return 0
    return int(command.main(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
