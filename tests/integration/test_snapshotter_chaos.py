"""A small run of the stress test of pods: it works, and nothing is noticed."""

import pytest

from tests.stress.pod_chaos import run_pod_chaos

pytestmark = [pytest.mark.needs_containerd, pytest.mark.needs_registry, pytest.mark.needs_fuse]


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_pods_notice_nothing_of_kills(driver: str) -> None:
    if driver == "erofs":
        from tests.integration.kernel_drivers import need_erofs_events

        need_erofs_events()
    report = run_pod_chaos(driver, kills=4, seconds=10.0, containers=1)
    assert report.is_clean, report
    assert sum(report.kills.values()) >= 3
