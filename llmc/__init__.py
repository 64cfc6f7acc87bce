"""llm.c's binary files and flags: `python -m llmc --help`."""
