"""`python -m mixmask`, for launchers that run modules."""

import sys

from mixmask.cli import main

sys.exit(main())
