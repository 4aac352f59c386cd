"""`python -m tools.published_circuits [FOLDER]`: write the published circuits (default: ./circuits)."""

import sys

from tools.published_circuits.write import write_library

if __name__ == "__main__":
    write_library(*(sys.argv[1:2] or ["circuits"]))
