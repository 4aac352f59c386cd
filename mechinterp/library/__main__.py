"""`python -m mechinterp.library [FOLDER]`: write the published circuits (default: ./circuits)."""

import sys

from mechinterp.library.write import write_library

if __name__ == "__main__":
    write_library(*(sys.argv[1:2] or ["circuits"]))
