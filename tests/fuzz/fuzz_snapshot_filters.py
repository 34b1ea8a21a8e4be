"""Filters of containerd, one to a line, and what labels say of a layer."""

from fuse.snapshotter.filters import Filters
from fuse.snapshotter.layer_labels import IMAGE_LABEL, LAYER_LABEL, MANIFEST_LABEL, read_labels
from tests.hostile import value_or_error

_FIELDS = {("name",): "a/1/b", ("kind",): "active", ("labels", "x"): "y"}
SEEDS = tuple(
    text.encode()
    for text in (
        'labels."containerd.io/snapshot.ref"==sha256:ab,parent==""',
        "name~=^a.*b$\nkind!=view,name",
        r'labels.x=="\x79\u0079\171",labels.x~=/y/',
        "127.0.0.1:5000/a/b:v1\nsha256:" + "a" * 64,
        "docker.io/library/x@sha256:" + "b" * 64,
    )
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    lines = data.decode("utf-8", "replace").split("\n")[:20]
    for line in lines:
        if "~=" in line:
            continue  # a regular expression may take as long as it likes: who writes it is root
        with value_or_error():
            assert Filters([line]).match(_FIELDS.get) in (True, False)
    for line in lines:
        for manifest in (lines[-1], "sha256:" + "a" * 64):
            found = read_labels({IMAGE_LABEL: line, MANIFEST_LABEL: manifest, LAYER_LABEL: line})
            assert found.image is None or str(found.image.exact).endswith(manifest)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_snapshot_filters")
