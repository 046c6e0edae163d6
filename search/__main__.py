"""`python -m planish.search` is `planish`."""

import sys

from .cli import main

sys.exit(main())
