"""Train many runs, and show what runs and models have learnt.

python -m analysis sweep --seed 1,2,3 --max_lr 1e-2,2e-2 -- --preset demo    # six runs
python -m analysis compare log/sweep                     # a row per setting: means over seeds, differences
python -m analysis evaluate log/latest my_text.txt       # loss, perplexity and bits per byte of a text
python -m analysis evaluate gpt2 edu_fineweb10B          # ... and of the validation shards in a folder
python -m analysis routing log/latest                    # what its experts have learnt, as a page
python -m analysis --help                                # all commands; COMMAND --help: a command's options
"""

import tokens.requirements  # noqa: F401 (first: an old Python or a missing package gets one line)
import argparse
import importlib
import sys

COMMANDS = ("sweep", "compare", "evaluate", "routing")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 bad options or files, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("python -m analysis", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    layout = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in COMMANDS:
        module = importlib.import_module(f"analysis.{name}")
        purpose = module.__doc__.split("\n")[0]
        module.add_options(commands.add_parser(name, help=purpose, description=purpose, **layout))
    words = sys.argv[1:] if arguments is None else arguments
    end = words.index("--") if "--" in words else len(words)  # behind it: flags of a sweep's runs
    options, flags = parser.parse_known_args(words[:end])
    if options.command == "sweep":
        options.words, options.flags, options.common = words, flags, words[end + 1 :]
    elif words[end:] or flags:
        parser.error(f"unrecognized arguments: {' '.join(flags or words[end:])}")
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
