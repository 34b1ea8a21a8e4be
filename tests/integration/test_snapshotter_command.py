"""`nydus-py snapshotter` as a process: how it begins and how it ends."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fuse.agent.client import wait_for
from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.layer_labels import IMAGE_LABEL, MANIFEST_LABEL
from fuse.snapshotter.ledger import SNAPSHOT_REF
from fuse.snapshotter.service import SERVICE
from fuse.supervisor.listener import listen
from tests.integration.cli_machine import Machine, with_socket

pytestmark = pytest.mark.needs_root

UP_WITHIN_S = 60.0
ENDS_WITHIN_S = 60.0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def process(machine: Machine, address: Path) -> Iterator["subprocess.Popen[bytes]"]:
    agent = machine.directory / "agent.sock"
    command = machine.command("snapshotter", "--address", address, "--agent-socket", agent)
    running = subprocess.Popen(command, env=machine.environment)
    try:
        assert wait_for(address, UP_WITHIN_S)
        yield running
    finally:
        running.kill()
        running.wait()


def prepare(channel: grpc.Channel, request: pb.PrepareRequest) -> grpc.Future:
    rpc = channel.unary_unary(
        f"/{SERVICE}/Prepare",
        request_serializer=pb.PrepareRequest.SerializeToString,
        response_deserializer=pb.MountsResponse.FromString,
    )
    return rpc.future(request, timeout=ENDS_WITHIN_S)


@pytest.mark.slow
def test_it_ends_when_told_to_also_while_a_call_waits(
    process: "subprocess.Popen[bytes]", address: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as registry:
        # It takes the connection and says nothing.
        host = f"127.0.0.1:{registry.getsockname()[1]}"
        labels = {
            SNAPSHOT_REF: "sha256:" + "1" * 64,
            IMAGE_LABEL: f"{host}/app:v1",
            MANIFEST_LABEL: "sha256:" + "2" * 64,
        }
        options = [("grpc.default_authority", "localhost")]
        with grpc.insecure_channel(f"unix://{address}", options=options) as channel:
            assert prepare(channel, pb.PrepareRequest(key="plain")).result().mounts
            waiting = prepare(channel, pb.PrepareRequest(key="layer", labels=labels))
            registry.accept()[0].close()
            connection, _ = registry.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(ENDS_WITHIN_S) == 0
            assert waiting.exception() is not None
            connection.close()


def test_who_asks_while_it_is_replaced_waits(machine: Machine, address: Path) -> None:
    command = machine.command("snapshotter", "--address", address, "--agent-socket", "/nobody.sock")
    with listen(address) as held, contextlib.ExitStack() as processes:

        def start() -> "subprocess.Popen[bytes]":
            number = held.fileno()
            running = subprocess.Popen(
                with_socket(command, number), env=machine.environment, pass_fds=(number,)
            )
            processes.callback(running.wait)
            processes.callback(running.kill)
            return running

        options = [("grpc.default_authority", "localhost")]
        with grpc.insecure_channel(f"unix://{address}", options=options) as channel:
            early = prepare(channel, pb.PrepareRequest(key="before anybody is there"))
            first = start()
            assert early.result().mounts
            first.kill()
            first.wait()
        with grpc.insecure_channel(f"unix://{address}", options=options) as channel:
            between = prepare(channel, pb.PrepareRequest(key="in between"))
            start()
            assert between.result().mounts


def test_its_socket_is_for_root_alone(process: "subprocess.Popen[bytes]", address: Path) -> None:
    assert address.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--driver", "pyfuse3"], 2, "the agent serves erofs and fuse"),
        (["--variants", "somewhere"], 2, "'somewhere' is none of"),
        (["--address", "/" + "x" * 120], 211, "cannot listen there"),
    ],
)
def test_what_cannot_be_is_said(machine: Machine, options: list[str], code: int, said: str) -> None:
    done = machine.run("snapshotter", *options)
    assert done.returncode == code
    assert said in " ".join(done.stderr.split())
