"""The command line of llmc/files.py: python -m llmc --help"""

import sys

from llmc.files import main

sys.exit(main())
