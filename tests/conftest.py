"""What every test shares: which machine it needs, and a log without unexpected warnings."""

import inspect
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PACKAGES = ("rafs", "fuse", "builder", "backend", "tools")

# The same examples on every run in CI: a red build is about the change that it builds.
settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def fixtures_dir() -> Path:
    """Where images made by other Nydus tools are; the tests on them are skipped where it is absent."""
    beside_the_clone = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "nydus"
    return Path(os.environ.get("NYDUS_FIXTURES", beside_the_clone))


def _missing_programs(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _no_root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _no_fuse() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    return _missing_programs("fusermount3")


def _no_erofs_mount() -> str | None:
    if "erofs" not in Path("/proc/filesystems").read_text():
        return "the kernel has no EROFS"
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    return _no_root()


def _no_fixtures() -> str | None:
    return None if fixtures_dir().is_dir() else f"no {fixtures_dir().name} fixtures; set NYDUS_FIXTURES"


def _no_net_namespaces() -> str | None:
    if reason := _no_root() or _missing_programs("ip", "tc", "unshare", "nsenter"):
        return reason
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "may not make namespaces"


# Marker -> why this machine cannot run such a test, or None when it can.
CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "needs_root": _no_root,
    "needs_fuse": _no_fuse,
    "needs_registry": lambda: _missing_programs("docker-registry"),
    "needs_skopeo": lambda: _missing_programs("skopeo"),
    "needs_umoci": lambda: _missing_programs("umoci"),
    "needs_erofs_utils": lambda: _missing_programs("mkfs.erofs", "dump.erofs", "fsck.erofs"),
    "needs_erofs_mount": _no_erofs_mount,
    "needs_containerd": lambda: _no_root() or _missing_programs("containerd", "runc", "ctr", "busybox"),
    "needs_nginx": lambda: _missing_programs("nginx"),
    "needs_net_namespaces": _no_net_namespaces,
    "needs_zstd": lambda: _missing_programs("zstd"),
    "needs_fixtures": _no_fixtures,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turns each `needs_...` marker that this machine cannot meet into a visible skip."""
    reasons: dict[str, str | None] = {}
    for item in items:
        for name in {mark.name for mark in item.iter_markers()} & CAPABILITIES.keys():
            if name not in reasons:
                reasons[name] = CAPABILITIES[name]()
            if reason := reasons[name]:
                item.add_marker(pytest.mark.skip(reason=reason))


def _arguments(request: pytest.FixtureRequest) -> set[str]:
    """The parameters that the test function itself names."""
    function = getattr(request.node, "function", None)
    return set(inspect.signature(function).parameters) if function else set()


@pytest.fixture(autouse=True)
def _no_unexpected_warning(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Fails a test during which this project logged a WARNING, which means that someone should act.

    A test that provokes one says so with the marker `logs_warning`, or takes `caplog` and looks itself.
    """
    yield
    if request.node.get_closest_marker("logs_warning") or "caplog" in _arguments(request):
        return
    unexpected = [
        f"{record.name}: {record.getMessage()}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING and record.name.partition(".")[0] in PACKAGES
    ]
    if unexpected:
        pytest.fail("unexpected in the log: " + "; ".join(unexpected))


@pytest.fixture(autouse=True)
def _no_personal_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the caches and the registry credentials of whoever runs the tests out of them."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    for name in (
        "DOCKER_CONFIG",
        "REGISTRY_AUTH_FILE",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
