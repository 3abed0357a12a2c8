"""`python -m lmmono`, and `accelerate launch -m lmmono`: the command line."""

from lmmono.cli.app import main

if __name__ == "__main__":
    main()
