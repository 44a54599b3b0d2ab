"""`python -m longlive_diffusers.cli`, for use where the `longlive` script is not on the path."""

import sys

from longlive_diffusers.cli import main


sys.exit(main())
