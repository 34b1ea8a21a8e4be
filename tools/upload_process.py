"""The upload server as a program, which the agent starts: `--channel N --listener N [--log-level L]`."""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from backend.peers.tls import PeerTls, TlsFiles
from fuse.agent.upload_process import UploadProcess
from tools.logs import LogLevel, configure_logging
from tools.runtime import run_async


def main(arguments: Sequence[str]) -> int:
    """Serves until the agent goes; the exit code."""
    parser = argparse.ArgumentParser(prog="nydus-py upload server")
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.WARNING)
    parser.add_argument("--pki", type=Path, help="directory with the certificate of this host")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--listener", type=int, required=True)
    options = parser.parse_args(arguments)
    configure_logging(options.log_level, sys.stderr)
    ends = [socket.socket(fileno=number) for number in (options.channel, options.listener)]
    for end in ends:
        end.set_inheritable(False)
    tls = PeerTls(TlsFiles.in_directory(options.pki)) if options.pki else None
    run_async(UploadProcess(ends[0], ends[1], tls).run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
