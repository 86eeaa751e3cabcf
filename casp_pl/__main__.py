"""`python -m casp_pl`."""

import sys

from casp_pl.cli import main

sys.exit(main())
