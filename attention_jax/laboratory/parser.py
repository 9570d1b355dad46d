"""The parser of the laboratory's commands."""

import argparse


class Parser(argparse.ArgumentParser):
    """Shows a module's text as its help, and raises ValueError for a bad flag."""

    def __init__(self, name: str, text: str):
        summary, _, rest = text.partition("\n\n")
        super().__init__(
            name,
            description=summary,
            epilog=rest,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise ValueError(message)
