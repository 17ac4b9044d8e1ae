"""`python -m fastvit_kernels` is the `fastvit-kernels` command."""

import sys

from fastvit_kernels.cli import main

sys.exit(main())
