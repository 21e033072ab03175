"""`python -m hf_ext`, the same as the `hf-ext` command."""

import sys

from hf_ext.cli import main


if __name__ == "__main__":
    sys.exit(main())
