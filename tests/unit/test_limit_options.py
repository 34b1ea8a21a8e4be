"""Limits as users write them, and whose limits count."""

from pathlib import Path

import pytest
import typer

from backend.peers.limit_control import LimitControl
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import open_limits
from tools.limit_options import flag_values, limit_lines, section_limits
from tools.peer_config import ConfigInvalid, read_config

MIB = 1 << 20


def test_flags_that_are_not_given_change_nothing() -> None:
    given = flag_values(
        {"limit_up": "50MiB/s", "limit_down": None, "limit_origin_requests": "20", "limit_task_up": "none"}
    )
    assert given == {"host_up_bps": 50 * MIB, "origin_rps": 20, "task_up_bps": None}


@pytest.mark.parametrize(("name", "text"), [("up", "50Mbit/s"), ("origin-requests", "3MiB/s")])
def test_a_limit_that_is_none_names_its_flag(name: str, text: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        flag_values({f"limit_{name}".replace("-", "_"): text})
    assert caught.value.param_hint == f"--limit-{name}"


def test_the_file_has_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[limits]\nup = "50MiB/s"\norigin_concurrency = 4\n')
    settings = section_limits(read_config(path).limits)
    assert settings == LimitSettings(host_up_bps=50 * MIB, origin_concurrency=4)
    path.write_text('[limits]\nsideways = "50MiB/s"\n')
    with pytest.raises(ConfigInvalid, match="there is no such limit"):
        read_config(path)


def test_limits_are_shown_as_they_are_written() -> None:
    shown = list(limit_lines({"host_up_bps": 50 * MIB, "origin_rps": 20, "host_down_bps": None}))
    assert shown == ["up 50.0 MiB/s", "origin-requests 20"]


async def test_the_stricter_of_host_and_cluster_counts() -> None:
    told: list[LimitSettings] = []
    async with open_limits(LimitSettings(host_up_bps=10, host_down_bps=10)) as limits:
        control = LimitControl(limits)
        control.on_change.append(lambda: told.append(limits.settings))
        control.set_cluster(LimitSettings(host_up_bps=5, task_up_bps=7))
        assert limits.settings == LimitSettings(host_up_bps=5, host_down_bps=10, task_up_bps=7)
        control.set_own(LimitSettings(host_up_bps=3))
        assert limits.settings == LimitSettings(host_up_bps=3, task_up_bps=7)
        control.set_cluster(LimitSettings())
        assert told[-1] == control.own
