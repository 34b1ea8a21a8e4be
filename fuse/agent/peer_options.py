"""How a host takes part in the peer cache. Cheap to import: a client has no time."""

import msgspec

from backend.keep_mode import KeepEncoded


class PeerOptions(msgspec.Struct, frozen=True):
    """How this host takes part. `listen` is `[ADDRESS]:PORT`; `upload_command` starts the upload server.

    `pki`: the directory with the certificate of this host, for mutual TLS. `keep_encoded`: of which blobs the
    encoded bytes are kept. `credentials_socket`: where to ask for credentials first if there is such a
    socket, for images that are opened for others.
    """

    schedulers: list[str]
    cache_dir: str
    upload_command: list[str]
    zone: str = ""
    labels: dict[str, str] = {}
    listen: str = ":8771"
    host_id: str = ""
    plain_http: bool | None = None
    ca_file: str | None = None
    insecure: bool = False
    pki: str | None = None
    keep_encoded: KeepEncoded = KeepEncoded.AUTO
    credentials_socket: str | None = None
