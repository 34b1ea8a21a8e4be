"""The entry of `nydus-py`: which verb, with which global options, and how an error ends the process.

Only the module of the verb that is asked for is imported, so that a mount or a usage error does not
wait for the libraries of the others.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from tools.failure import report_failure
from tools.logs import LogLevel, configure_logging
from tools.settings import hoist_globals, make_settings

PROGRAM = "nydus-py"


class Verb(NamedTuple):
    """A verb: its module `tools.<module>` has a function `run` whose parameters are its command line.

    A verb with several actions has a table of such functions instead, `ACTIONS`.
    """

    module: str
    summary: str
    example: str


VERBS = {
    "build": Verb(
        "build",
        "Make an image from a directory or a tar stream and push it.",
        "nydus-py build ./model 127.0.0.1:5000/models/llama:v1",
    ),
    "convert": Verb(
        "convert",
        "Convert a container image layer by layer and push the result.",
        "nydus-py convert 127.0.0.1:5000/app:v1 127.0.0.1:5000/app:v1-nydus",
    ),
    "mount": Verb(
        "mount",
        "Mount an image lazily; returns when the mount is usable.",
        "nydus-py mount 127.0.0.1:5000/models/llama:v1 /models/llama",
    ),
    "umount": Verb("umount", "Unmount an image.", "nydus-py umount /models/llama"),
    "status": Verb(
        "status", "Show what is mounted and how much was fetched.", "nydus-py status /models/llama"
    ),
    "agent": Verb(
        "agent", "Serve all mounts of this host; --upgrade replaces it.", "nydus-py agent --upgrade"
    ),
    "snapshotter": Verb(
        "snapshotter",
        "Serve containerd: pods start from images that are not downloaded first.",
        "nydus-py snapshotter --address /run/nydus-py/snapshotter.sock",
    ),
    "limits": Verb(
        "limits",
        "Show what this host may send and receive, or change it while the agent runs.",
        "nydus-py limits set --limit-up 50MiB/s --limit-origin none",
    ),
    "check": Verb(
        "check",
        "Verify an image; --deep reads and verifies every chunk.",
        "nydus-py check --deep 127.0.0.1:5000/models/llama:v1",
    ),
    "inspect": Verb("inspect", "Show what an image consists of.", "nydus-py inspect --json oci:./layout:v1"),
    "diff": Verb(
        "diff",
        "Show what differs between two images, and what a host with one fetches for the other.",
        "nydus-py diff 127.0.0.1:5000/app:v1-nydus 127.0.0.1:5000/app:v2-nydus",
    ),
    "ls": Verb("ls", "List files of an image.", "nydus-py ls -l 127.0.0.1:5000/models/llama:v1 /"),
    "cat": Verb(
        "cat",
        "Write one file of an image to standard output.",
        "nydus-py cat 127.0.0.1:5000/models/llama:v1 /config.json",
    ),
    "unpack": Verb(
        "unpack",
        "Write all files of an image into a directory, or as a tar stream.",
        "nydus-py unpack 127.0.0.1:5000/models/llama:v1 - | tar -t",
    ),
    "merge": Verb(
        "merge",
        "Put Nydus images on top of each other and push what they are together.",
        "nydus-py merge 127.0.0.1:5000/models/all:v1 127.0.0.1:5000/base:v1 127.0.0.1:5000/llama:v1",
    ),
    "compact": Verb(
        "compact",
        "Write an image again without the chunks that no file uses.",
        "nydus-py compact 127.0.0.1:5000/app:v9 127.0.0.1:5000/app:v9-small",
    ),
    "copy": Verb(
        "copy",
        "Copy an image between registries and layouts; only missing blobs travel.",
        "nydus-py copy 127.0.0.1:5000/models/llama:v1 oci:./layout:v1",
    ),
    "scheduler": Verb(
        "scheduler",
        "Tell the hosts of a cluster about each other, so that they give each other what they have.",
        "nydus-py scheduler --listen :8770",
    ),
    "simulate": Verb(
        "simulate",
        "Find out how long many hosts would need for one image, in virtual time.",
        "nydus-py simulate --hosts 8,1000 --size 100GB --rate 10gbit",
    ),
    "install": Verb(
        "install",
        "Set this host up: systemd units, containerd's settings, the registry mirror; --remove undoes it.",
        "nydus-py install --dry-run",
    ),
    "pki": Verb(
        "pki",
        "Make a certificate authority for the hosts of a cluster, and issue certificates.",
        "nydus-py pki issue node7 --scope zone:az1 --address 10.0.0.7",
    ),
}


class LazyGroup(TyperGroup):
    """Lists every verb from the table above and imports the module of the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The name, the command and the remaining arguments, as in the base class."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_verb(name), rest


def load_verb(name: str) -> Any:
    """The complete command of a verb; imports its module."""
    verb = VERBS[name]
    module = importlib.import_module(f"tools.{verb.module}")
    app = _new_app()
    epilog = f"Example: {verb.example}\n\nThe options of `{PROGRAM} --help` may stand here as well."
    if actions := getattr(module, "ACTIONS", None):
        app.callback(help=verb.summary, epilog=epilog)(_nothing)
        for action, function in actions.items():
            app.command(action, help=function.__doc__)(function)
    else:
        app.command(name, help=module.run.__doc__ or verb.summary, epilog=epilog)(module.run)
    command = typer.main.get_command(app)
    command.name = name
    return command


def command_line() -> typer.Typer:
    """The whole command line, its verbs not yet loaded."""
    app = _new_app(cls=LazyGroup)
    app.callback(epilog="References: HOST[:PORT]/REPO[:TAG|@DIGEST], oci:DIR[:TAG] or dir:DIR.")(_globals)
    for name, verb in VERBS.items():
        app.command(name, help=verb.summary)(_not_loaded)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line (without the program's name) and returns the exit code."""
    debug = "--debug" in arguments
    try:
        command_line()(args=hoist_globals(arguments), prog_name=PROGRAM)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException as error:
        return report_failure(error, debug=debug)
    return 0


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def _globals(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with an error, and log everything.")
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="What to log on standard error.")] = LogLevel.WARNING,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where fetched data is kept.  [default: /var/lib/nydus-py, or ~/.cache/nydus-py]"),
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Talk HTTP without TLS to registries on other hosts too.")
    ] = False,
    ca_file: Annotated[
        Path | None, typer.Option(help="Trust the certificate authorities of this PEM file as well.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do not verify the certificate of a registry.")
    ] = False,
) -> None:
    """Deduplicated, content-addressed images in OCI registries, mounted lazily."""
    settings = make_settings(
        cache_dir=cache_dir,
        plain_http=plain_http,
        ca_file=ca_file,
        insecure_skip_verify=insecure,
        debug=debug,
        log_level=log_level,
    )
    configure_logging(settings.log_level, sys.stderr)
    ctx.obj = settings


def _nothing() -> None:
    """A verb with actions does nothing by itself."""


def _not_loaded() -> None:
    """Stands for a verb in the list of verbs."""
    raise AssertionError("LazyGroup loads the verb instead")


def _new_app(cls: type[TyperGroup] | None = None) -> typer.Typer:
    return typer.Typer(
        cls=cls,
        add_completion=False,
        no_args_is_help=cls is not None,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


if __name__ == "__main__":
    main()
