"""`python -m flashmoe_lab` is `flashmoe-lab`."""

import sys

from flashmoe_lab.cli import main

sys.exit(main())
