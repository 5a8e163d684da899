"""`python -m fusedkd.distilbert [options]`: see `distil` for what it does, `config` for its options."""

import sys


def main(argv: list[str] | None = None) -> int:
    try:
        from fusedkd.distilbert import config, distil
        from fusedkd.integrations.command import command_line
    except ModuleNotFoundError as error:
        if (name := str(error.name).partition(".")[0]) == "fusedkd":
            raise
        print(f'error: {name} is missing: the driver needs pip install "fusedkd[train]"', file=sys.stderr)
        return 2
    return command_line(lambda: distil.distil(config.parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
