"""`python -m ddpm` is `ddpm`."""

import sys

from ddpm.cli import main

if __name__ == "__main__":
    sys.exit(main())
