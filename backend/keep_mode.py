"""Which blobs' encoded bytes a host keeps beside the decoded ones, for others to be sent."""

import enum

AUTO_SHARE = 2 / 3
"""With `auto` the encoded bytes are kept where they are at most this share of the decoded ones."""


class KeepEncoded(enum.StrEnum):
    """Of which blobs."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"

    def keeps(self, encoded_bytes: int, decoded_bytes: int) -> bool:
        """Whether a blob of these sizes is kept."""
        if self is KeepEncoded.AUTO:
            return encoded_bytes <= AUTO_SHARE * decoded_bytes
        return self is KeepEncoded.ALWAYS
