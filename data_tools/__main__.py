"""``python -m data_tools COMMAND …``"""

from data_tools.chat import chat
from data_tools.corpus import corpus
from data_tools.inspect import inspect
from data_tools.tokenize import tokenize
from data_tools.tokenizer import tokenizer
from megatron_lite import cli


def main() -> None:
    """Run the command named on the command line."""
    commands: dict[str, cli.Command] = {
        "corpus": corpus,
        "tokenizer": tokenizer,
        "tokenize": tokenize,
        "chat": chat,
        "inspect": inspect,
    }
    cli.main(commands, prog="data_tools")


if __name__ == "__main__":
    main()
