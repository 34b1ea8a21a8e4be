"""Addresses that somebody else wrote: taken apart without an exception of the parser's own."""

from urllib.parse import SplitResult, urlsplit


def split_address(url: str) -> SplitResult | None:
    """The parts of `url`, its host and port known to be readable; None for what is no address."""
    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port  # both are read only when asked for, and raise then
    except ValueError:
        return None
    return parts


def display_url(url: str) -> str:
    """`url` without user information, query and fragment, where secrets may be; never fails."""
    parts = split_address(url)
    if parts is None:
        return "an address that cannot be read"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
