"""`python -m longlive_diffusers.cli`, for where the `longlive` script is not on the path."""

import sys

from longlive_diffusers.cli import main


sys.exit(main())
