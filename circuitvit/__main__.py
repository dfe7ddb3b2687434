"""`python -m circuitvit`: the command line."""

from circuitvit.cli import main

if __name__ == "__main__":
    main()
