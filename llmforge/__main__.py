"""`python -m llmforge` is the same as `llmforge`."""

import sys

from llmforge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
