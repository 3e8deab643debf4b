"""What all commands share: errors made on purpose as one message, Ctrl-C with the way to go on."""

from __future__ import annotations

import shlex
from typing import Any

import typer
from typer.core import TyperGroup

from kiop_fast.errors import KiopError

_ARGUMENTS = "kiop_fast.arguments"


class Commands(TyperGroup):
    """Errors made on purpose print as one message; Ctrl-C says how to go on."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KiopError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(_interrupted(ctx.meta[_ARGUMENTS]), err=True)
            raise typer.Exit(130) from None


def _interrupted(arguments: list[str]) -> str:
    if arguments[:1] != ["train"]:
        return "\nstopped"
    again = [*arguments, *(["--resume"] if "--resume" not in arguments else [])]
    return f"\nstopped; finished epochs are kept. Continue with:\n  kiop-fast {shlex.join(again)}"
