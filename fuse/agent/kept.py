"""What an agent tells of itself, and what it leaves to its successor."""

from pathlib import Path

import msgspec

from backend.store import BlobMetaFile, ImageMetadata
from fuse.agent.peer_report import PeerStatus
from fuse.agent.request import MountRequest
from fuse.mount_status import SessionStatus


class AgentStatus(msgspec.Struct, frozen=True):
    """The agent and its mounts. `restarts`: agents that have died or were replaced before this one."""

    pid: int
    version: str
    restarts: int
    mounts: list[SessionStatus]
    peers: PeerStatus | None = None


class KeptMetadata(msgspec.Struct, frozen=True):
    """Where an image's metadata is, for a successor: it must not depend on the registry."""

    digest: str
    directory: str
    bootstrap: str
    tables: dict[str, str]

    @classmethod
    def of(cls, metadata: ImageMetadata) -> "KeptMetadata":
        """The form that is kept."""
        tables = {table.blob_id: str(table.path) for table in metadata.blob_meta_paths}
        return cls(metadata.digest, str(metadata.directory), str(metadata.bootstrap_path), tables)

    def restored(self) -> ImageMetadata:
        """The metadata again."""
        tables = tuple(BlobMetaFile(blob_id, Path(path)) for blob_id, path in self.tables.items())
        return ImageMetadata(self.digest, Path(self.directory), Path(self.bootstrap), tables)


class KeptMount(msgspec.Struct, frozen=True):
    """What a successor must know of a mount. `is_mounted` only after the kernel has it."""

    request: MountRequest
    metadata: KeptMetadata
    since: str
    remark: str
    is_mounted: bool
    driver_values: dict[str, str | bool] = {}
