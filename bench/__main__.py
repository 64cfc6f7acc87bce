"""Measurements: python -m bench --help"""

import sys

from bench.commands import main

sys.exit(main())
