"""``python -m tunesmith`` is the command ``tunesmith``."""

from tunesmith.cli.main import program

if __name__ == "__main__":
    program()
