"""An index whose entries stay as they are, so that what other tools wrote there survives a change."""

import msgspec


class RawIndex(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`index.json` of an OCI layout, or an index of referrers. Its `manifests` are descriptors."""

    schema_version: int = msgspec.field(name="schemaVersion")
    media_type: str = msgspec.field(default="", name="mediaType")
    manifests: tuple[msgspec.Raw, ...]
    annotations: dict[str, str] = {}
