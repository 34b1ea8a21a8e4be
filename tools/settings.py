"""The options that every verb shares, and the directories that follow from them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tools.logs import LogLevel

if TYPE_CHECKING:
    from backend.registry import RegistryOptions

# Global options may stand before or behind the verb.
GLOBAL_FLAGS = frozenset({"--debug", "--plain-http", "--insecure"})
GLOBAL_VALUES = frozenset({"--log-level", "--cache-dir", "--ca-file"})


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options, with every default filled in and every path absolute."""

    cache_dir: Path
    run_dir: Path
    plain_http: bool
    ca_file: Path | None
    insecure_skip_verify: bool
    debug: bool
    log_level: LogLevel

    @property
    def images_dir(self) -> Path:
        """Where manifests and bootstraps are kept, one directory for each manifest digest."""
        return self.cache_dir / "images"

    def registry_options(self) -> "RegistryOptions":
        """What a registry client needs to know."""
        from backend.registry import RegistryOptions

        return RegistryOptions(
            plain_http=True if self.plain_http else None,
            ca_file=self.ca_file,
            insecure_skip_verify=self.insecure_skip_verify,
        )


def make_settings(
    *,
    cache_dir: Path | None = None,
    plain_http: bool = False,
    ca_file: Path | None = None,
    insecure_skip_verify: bool = False,
    debug: bool = False,
    log_level: LogLevel = LogLevel.WARNING,
) -> Settings:
    """Fills in the defaults from the user and the environment."""
    return Settings(
        cache_dir=(cache_dir or default_cache_dir()).absolute(),
        run_dir=default_run_dir().absolute(),
        plain_http=plain_http,
        ca_file=ca_file and ca_file.absolute(),
        insecure_skip_verify=insecure_skip_verify,
        debug=debug,
        log_level=LogLevel.DEBUG if debug else log_level,
    )


def settings_of(ctx: typer.Context) -> Settings:
    """The settings that the global options left in the context of a verb."""
    settings = ctx.obj
    assert isinstance(settings, Settings)
    return settings


def default_cache_dir() -> Path:
    """/var/lib/nydus-py for root, else nydus-py in the cache directory of the XDG specification."""
    if os.geteuid() == 0:
        return Path("/var/lib/nydus-py")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nydus-py"


def default_run_dir() -> Path:
    """Where running mounts are found: NYDUS_PY_RUN_DIR, else /run/nydus-py for root or XDG_RUNTIME_DIR."""
    if chosen := os.environ.get("NYDUS_PY_RUN_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/nydus-py")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "nydus-py"
    return default_cache_dir() / "run"


def hoist_globals(arguments: Sequence[str]) -> list[str]:
    """The arguments with every global option moved before the verb; what follows `--` stays."""
    moved: list[str] = []
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--":
            rest += ["--", *pending]
            break
        if argument in GLOBAL_FLAGS or argument.partition("=")[0] in GLOBAL_VALUES:
            moved.append(argument)
            if argument in GLOBAL_VALUES and pending:
                moved.append(pending.pop(0))
        else:
            rest.append(argument)
    return moved + rest
