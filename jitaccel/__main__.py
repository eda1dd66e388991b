"""`python -m jitaccel`, the same as the `jitaccel` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
