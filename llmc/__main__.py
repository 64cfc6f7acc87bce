"""llm.c's binary files, both ways: python -m llmc --help"""

import sys

from llmc.files import main

sys.exit(main())
