"""The command line: `deltatune COMMAND`. Neither torch nor transformers is loaded before a command needs it."""

from deltatune.commands import adapted, chat, data, doctor, merging, methods, predict, runs, train
from deltatune.commands.shell import main

__all__ = ["adapted", "chat", "data", "doctor", "main", "merging", "methods", "predict", "runs", "train"]

if __name__ == "__main__":
    main()
