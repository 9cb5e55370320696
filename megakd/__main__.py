"""`python -m megakd`: the command `megakd`."""

import sys

from megakd.cli import main

sys.exit(main())
