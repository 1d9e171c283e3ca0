"""`python -m deltatune` is the command `deltatune`."""

from deltatune.cli import main

if __name__ == "__main__":
    main()
