"""`python -m longlive_diffusers.cli`, for where the `longlive` script is not on the path."""

import sys

from . import main


sys.exit(main())
