"""containerd's filter language."""

import pytest

from fuse.snapshotter.failures import RequestInvalid
from fuse.snapshotter.filters import Filters

OBJECT = {
    ("name",): "k8s.io/3/top",
    ("kind",): "committed",
    ("parent",): "",
    ("labels", "containerd.io/snapshot.ref"): "sha256:ab",
    ("labels", "a"): 'quote " and, comma',
}


def holds(*filters: str) -> bool:
    return Filters(filters).match(OBJECT.get)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "name==k8s.io/3/top",
        'name == "k8s.io/3/top"',
        'labels."containerd.io/snapshot.ref"==sha256:ab,parent==""',
        'labels."containerd.io/snapshot.ref"',
        "kind!=active",
        "labels.missing!=x",
        "name~=^k8s.*top$",
        "name~=/[0-9]/",
        "name~=|k8s.io/3|",
        "labels.missing~=^$",
        r'labels.a=="quote \" and, comma"',
        r"labels.a=='quote \x22 and, comma'",
        r'labels.a=="quote \" and, c\u006fmma"',
        r'labels.a=="quote \042 and, comma"',
    ],
)
def test_filters_that_hold(text: str) -> None:
    assert holds(text)


@pytest.mark.parametrize(
    "text",
    [
        "name==k8s.io/3/to",
        "labels.missing",
        "labels.missing==x",
        "nonsense",
        "name,kind==active",
        "name~=^top",
        'labels."containerd.io/snapshot.ref"==sha256:ab,parent=="sha256:cd"',
    ],
)
def test_filters_that_do_not(text: str) -> None:
    assert not holds(text)


def test_one_of_several_is_enough_and_none_mean_all() -> None:
    assert holds("kind==active", "kind==committed")
    assert not holds("kind==active", "kind==view")
    assert holds()


@pytest.mark.parametrize(
    "text",
    [
        "==x",
        "name=x",
        "name===x",
        'name=="x',
        "name==",
        "name,,kind",
        "name x",
        ".",
        "name~=(",
        "name~=[",
        "name.",
    ],
)
def test_what_is_no_filter_is_said_to_be_none(text: str) -> None:
    with pytest.raises(RequestInvalid):
        holds(text)
