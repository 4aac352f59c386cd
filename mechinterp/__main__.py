"""`python -m mechinterp` is `discover-circuit`."""

import sys

from mechinterp.cli import main

sys.exit(main())
