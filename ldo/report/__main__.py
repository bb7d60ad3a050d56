"""``python -m ldo.report RUN``: write the report of a run, finished or not."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.report.run_report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.report", description="Write report.html and report.json of a run, finished or not."
    )
    parser.add_argument("run", help="folder of a run, e.g. runs/sandbox")
    run = Path(parser.parse_args(argv).run)
    if not (run / "recipe.yaml").is_file():
        print(f"ldo: {run} is not the folder of a run: it has no recipe.yaml", file=sys.stderr)
        return 2
    print(write_report(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
