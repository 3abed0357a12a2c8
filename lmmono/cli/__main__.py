"""`python -m lmmono.cli`, and `accelerate launch -m lmmono.cli`."""

from lmmono.cli.app import main

if __name__ == "__main__":
    main()
