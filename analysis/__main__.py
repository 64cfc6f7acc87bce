"""What runs and models show. It reads logs, checkpoints and data, and changes nothing.

python -m analysis evaluate log/latest my_text.txt       # loss, perplexity and bits per byte of a text
python -m analysis evaluate gpt2 edu_fineweb10B          # ... and of the validation shards in a folder
python -m analysis routing log/latest                    # what its experts have learnt, as a page
python -m analysis --help                                # all commands; COMMAND --help: a command's options
"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import importlib
import sys

COMMANDS = {
    "evaluate": "loss, perplexity and bits per byte of a text or shards with a model",
    "routing": "what the experts of a checkpoint have learnt: a page, pictures and JSON",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 bad options or files, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m analysis", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    layout = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, purpose in COMMANDS.items():
        module = importlib.import_module(f"analysis.{name}")
        module.add_options(commands.add_parser(name, help=purpose, description=purpose, **layout))
    options = parser.parse_args(arguments)
    from tokens.printable import print_error

    try:
        return importlib.import_module(f"analysis.{options.command}").run(options)
    except (ValueError, OSError, ArithmeticError) as error:
        print_error("python -m analysis", error)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
