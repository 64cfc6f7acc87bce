"""The command line of llmc/files.py: python -m llmc --help"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import sys

from llmc.files import main

sys.exit(main())
