"""``python -m spotguard``: the command line."""

from spotguard.cli import main

if __name__ == "__main__":
    main()
