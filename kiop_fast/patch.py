"""``python -m kiop_fast.patch KiOP_BF.py FLAGS``: the authors' script, its classes accelerated."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from kiop_fast.errors import KiopError, UpstreamError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script under the patch; 0, or 2 after a message.  Says what was called, at the end."""
    from kiop_fast.dropin.patching import accelerate_upstream

    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print("usage: python -m kiop_fast.patch SCRIPT.py FLAGS")
        return 0 if given else 2
    before, path = list(sys.argv), list(sys.path)
    script = Path(given[0])
    try:
        if not script.is_file():
            raise UpstreamError("no such script", got=script.resolve(),
                                expected="KiOP_BF.py or another script of the checkout",
                                fix="run in the checkout")  # fmt: skip
        sys.argv = [str(script), *given[1:]]
        sys.path.insert(0, str(script.resolve().parent))
        count = accelerate_upstream()
        runpy.run_path(str(script), run_name="__main__")
        said = ", ".join(f"{name} {times}" for name, times in sorted(count.items()))
        print(f"kiop_fast: accelerated calls: {said or 'none'}", file=sys.stderr)
    except KiopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        accelerate_upstream(False)
        sys.argv, sys.path[:] = before, path
    return 0


if __name__ == "__main__":
    sys.exit(main())
