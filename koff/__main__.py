"""`python -m koff`, the command line where no script `koff` is on the path."""

from .cli import app

if __name__ == "__main__":
    app()
