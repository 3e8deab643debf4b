"""``python -m kiop_fast.upstream KiOP_BF.py FLAGS``: a shell script changes one word."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kiop_fast.errors import KiopError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script's command line; 0, or 2 after a message."""
    from kiop_fast.dropin.command import run_upstream
    from kiop_fast.dropin.flags import SCRIPTS
    from kiop_fast.runtime.progress import make_progress

    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: python -m kiop_fast.upstream {{{','.join(SCRIPTS)}}}[.py] FLAGS")
        return 0 if given else 2
    try:
        with make_progress() as progress:
            run_upstream(given[0], given[1:], progress)
    except (KiopError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
