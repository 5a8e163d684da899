"""`python -m fusedkd.distilbert`: see `driver`."""

import sys


def main(argv: list[str] | None = None) -> int:
    try:
        from fusedkd.distilbert import driver
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fusedkd"):
            raise
        print(f'error: {error.name} is missing: the driver needs pip install "fusedkd[train]"', file=sys.stderr)
        return 2
    return driver.main(argv)


if __name__ == "__main__":
    sys.exit(main())
