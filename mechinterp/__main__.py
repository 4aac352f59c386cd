"""`python -m mechinterp` is `discover-circuit`."""

import sys

from mechinterp.cli.app import main

sys.exit(main())
