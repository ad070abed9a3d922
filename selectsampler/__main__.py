"""`python -m selectsampler`: the command line, also under torchrun."""

import sys

from selectsampler.cli import main

sys.exit(main())
