"""What a mount says of itself."""

import datetime
import os
from pathlib import Path

import msgspec

from backend.fetch_statistics import FetchStatistics
from fuse.image import OpenedImage


class SessionStatus(msgspec.Struct, frozen=True):
    """What a mount says of itself. Sizes in bytes: of the encoded blobs, decoded, and cached on the disk.

    `driver_remark` tells why no better driver was taken; `is_complete`: nothing is left to fetch.
    """

    reference: str
    digest: str
    driver: str
    mountpoint: str
    pid: int
    since: datetime.datetime
    image_size_bytes: int
    decoded_size_bytes: int
    cached_bytes: int
    fetched: FetchStatistics
    driver_remark: str = ""
    is_complete: bool = False
    state: str = "mounted"


def describe(
    image: OpenedImage,
    mountpoint: Path,
    driver: str,
    since: datetime.datetime,
    driver_remark: str = "",
    state: str = "mounted",
) -> SessionStatus:
    """The state of a mount of `image` at this moment."""
    return SessionStatus(
        reference=image.reference,
        digest=image.metadata.digest,
        driver=driver,
        mountpoint=os.fspath(mountpoint),
        pid=os.getpid(),
        since=since,
        image_size_bytes=image.encoded_size,
        decoded_size_bytes=image.decoded_size,
        cached_bytes=image.cached_bytes(),
        fetched=image.statistics(),
        driver_remark=driver_remark,
        is_complete=image.is_complete(),
        state=state,
    )
