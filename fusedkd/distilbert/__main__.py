"""`python -m fusedkd.distilbert [distil | finetune | ablate] [options]`: see `commands`."""

import sys


def main(argv: list[str] | None = None) -> int:
    try:
        from fusedkd.distilbert import commands

        return commands.main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("error: interrupted; what is finished is kept, see --resume_from_checkpoint", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fusedkd"):
            raise
        print(f'error: {error.name} is missing: the driver needs pip install "fusedkd[train]"', file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
