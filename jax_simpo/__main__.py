"""The `jax-simpo` command, and `python -m jax_simpo`: imports the command line, which takes a second, and runs it."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # of a shell: 128 and the number of SIGINT


def main() -> None:
    """Runs the command. Until it is imported, Ctrl-C ends it in the same words as later."""
    try:
        from jax_simpo.cli import main as run
    except KeyboardInterrupt:
        print("\nSIGINT: ended. Nothing was written. Start the same command again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
