"""The command `raylign`: all its verbs, and the exit codes of their outcomes.

Heavy imports happen inside the verbs, so that --help is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from actors.errors import EXIT_DONE, EXIT_USER, RunFailure, UserError
from pipeline.api import quiet_telemetry
from pipeline.cli import cluster, models, runs
from pipeline.monitoring import console

app = typer.Typer(
    name="raylign",
    help="SFT, reward models, DPO and online RL of mixture-of-experts models, with LoRA, in Ray actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        from pipeline.cli.environment import raylign_version

        console.say(f"raylign {raylign_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """SFT, reward models, DPO and online RL of mixture-of-experts models, with LoRA, in Ray actors."""


for panel, verbs in {"A run": runs, "On a cluster": cluster, "What a run made": models}.items():
    for verb in verbs.verbs.registered_commands:
        verb.rich_help_panel = panel
    app.add_typer(verbs.verbs)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failure, 2 the user's mistake, 75 stopped."""
    quiet_telemetry()
    try:
        result: Any = app(args=arguments, prog_name="raylign", standalone_mode=False)
        return int(result or EXIT_DONE)
    except UserError as error:
        return console.user_error(error)
    except RunFailure as error:
        return console.run_failure(error)
    except (KeyboardInterrupt, typer.Abort):
        console.err.print("interrupted")
        return 130
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):
            error.show()
            return EXIT_USER
        raise


if __name__ == "__main__":
    sys.exit(main())
