"""`python -m diffstill`, for launchers that start modules, such as torchrun."""

from diffstill.cli import main

if __name__ == "__main__":
    main(prog_name="diffstill")
