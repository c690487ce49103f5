"""Run the command line as ``python -m branchkey_integrations``."""

import sys

from branchkey_integrations.cli import main

sys.exit(main())
