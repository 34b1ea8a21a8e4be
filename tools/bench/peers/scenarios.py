"""What is done to the hosts, one function for each scenario."""

import sys
from collections.abc import Callable, Mapping, Sequence

from tools.bench.peers import liar
from tools.bench.peers.bed import Bed, patience_s
from tools.bench.peers.host import PEER_PORT, Host
from tools.bench.peers.node import NodeFailed
from tools.bench.peers.outcome import Case, Outcome
from tools.bench.peers.party import Interruption, Measured, Party
from tools.bench.peers.registry_node import Image

ALL, NOTHING = "all", "none"

Scenario = Callable[[Bed, int, bool], Outcome]


def start(bed: Bed, count: int, peers: bool) -> Outcome:
    """All hosts mount the model and read all of it."""
    case = bed.same_for_all("start", peers, count)
    with bed.party(count, peers=peers) as party:
        direct_s = None
        if count == 1:
            ((blob_id, _),) = bed.image.blobs
            direct_s = party.hosts[0].download_s(bed.registry.blob_url(blob_id))
        return read_all(case, party, party.hosts, direct_s=direct_s)


def lazy(bed: Bed, count: int, peers: bool) -> Outcome:
    """Some readers a host read 4 KiB here and there; judged by the chunks that anybody touched."""
    shape, image = bed.shape, bed.image
    with bed.party(count, peers=peers) as party:
        jobs = [
            (host, host.job(image, NOTHING, shape.readers, shape.reads, str(shape.seed)))
            for host in party.hosts
        ]
        hanging_s = patience_s(bed.same_for_all("lazy", peers, count))
        measured = party.together(jobs, hanging_s)
        chunk_bytes = image.size_bytes // image.chunks
        touched = {chunk for done in measured.done for chunk in done.touched}
        wanted = [len(done.touched) * chunk_bytes for done in measured.done]
        case = bed.case("lazy", peers, image, len(touched) * chunk_bytes, wanted)
        return _judge(case, party, measured, party.hosts)


def owner_killed(bed: Bed, count: int, peers: bool) -> Outcome:
    """One host loses all its processes in mid-way; the others finish."""
    return _host_lost(bed, count, peers, "owner-killed", lambda victim: victim.node.kill_all())


def owner_unplugged(bed: Bed, count: int, peers: bool) -> Outcome:
    """One host cannot be reached any more, and nobody is told: no reset, only silence."""
    return _host_lost(bed, count, peers, "owner-unplugged", lambda victim: victim.link.unplug())


def scheduler_killed(bed: Bed, count: int, peers: bool) -> Outcome:
    """The scheduler dies in mid-way and does not come back; all finish."""
    case = bed.same_for_all("scheduler-killed", peers, count)
    with bed.party(count, peers=peers) as party:
        if party.scheduler is None:
            raise NodeFailed(node="scheduler", command="scheduler-killed", why="needs peers")
        half = Interruption(_half(case), party.scheduler.node.kill_all)
        return read_all(case, party, party.hosts, half)


def corrupt(bed: Bed, count: int, peers: bool) -> Outcome:
    """One host has the model, marked as present, with flipped bytes; the others read it."""
    case = bed.same_for_all("corrupt", peers, count - 1)
    with bed.party(count, peers=peers, joining=1) as party:
        holder, *others = party.hosts
        _fill(case, party, holder)
        holder.run("umount", holder.mountpoint(bed.image))
        holder.node.kill_all()
        if not holder.damage_cache():
            raise NodeFailed(node=holder.node.name, command="corrupt", why="nothing is in its cache")
        if party.scheduler is not None:
            party.scheduler.wait_for_hosts(0)
        bed.join(party, party.hosts, count)
        _mount_only(bed.image, holder)
        _wait_until_known(party, bed.image)
        return read_all(case, party, others)


def lies(bed: Bed, count: int, peers: bool) -> Outcome:
    """One host has the model, and flips bytes of whatever it sends; the others read it."""
    case = bed.same_for_all("lies", peers, count - 1)
    with bed.party(count, peers=peers, joining=1) as party:
        holder, *others = party.hosts
        _fill(case, party, holder)
        _wait_until_known(party, bed.image)
        # Connections from outside go to the liar, its own ones to the server.
        rule = ("PREROUTING", "-p", "tcp", "--dport", PEER_PORT, "-j", "REDIRECT", "--to-ports", liar.PORT)
        holder.node.run("iptables", "-w", "-t", "nat", "-A", *rule)
        server = (holder.address, PEER_PORT)
        log = holder.directory / "liar.log"
        holder.node.start(log, sys.executable, "-m", "tools.bench.peers.liar", *server)
        bed.join(party, others, count)
        return read_all(case, party, others)


def version2(bed: Bed, count: int, peers: bool) -> Outcome:
    """Hosts that hold the model read its next version, a hundredth of whose chunks are others."""
    second, changed_bytes = bed.next_version
    case = bed.case("version2", peers, second, changed_bytes, [changed_bytes] * count)
    first = bed.same_for_all("version2", peers, count)
    with bed.party(count, peers=peers) as party:
        before = read_all(first, party, party.hosts)
        if not before.is_right:
            raise NodeFailed(node="version2", command="first version", why="; ".join(before.failures))
        for host in party.hosts:  # which flushes what was read last, at once
            host.run("umount", host.mountpoint(bed.image))
        return read_all(case, party, party.hosts)


SCENARIOS: Mapping[str, Scenario] = {
    "start": start,
    "lazy": lazy,
    "owner-killed": owner_killed,
    "owner-unplugged": owner_unplugged,
    "corrupt": corrupt,
    "lies": lies,
    "scheduler-killed": scheduler_killed,
    "version2": version2,
}
LEAST_HOSTS = {"owner-killed": 2, "owner-unplugged": 2, "corrupt": 2, "lies": 2}
PEERS_ONLY = frozenset({"lies", "scheduler-killed"})


def read_all(
    case: Case,
    party: Party,
    hosts: Sequence[Host],
    interruption: Interruption | None = None,
    direct_s: float | None = None,
) -> Outcome:
    """`hosts` mount the image of the case and read it from end to end."""
    jobs = [(host, host.job(case.image, ALL)) for host in hosts]
    measured = party.together(jobs, patience_s(case), interruption)
    victims = interruption.victims if interruption else frozenset()
    left = [host for host in hosts if host.node.name not in victims]
    return _judge(case, party, measured, left, direct_s)


def _host_lost(bed: Bed, count: int, peers: bool, name: str, lose: Callable[[Host], object]) -> Outcome:
    case = bed.same_for_all(name, peers, count)
    with bed.party(count, peers=peers) as party:
        victim = party.hosts[-1]
        victims = frozenset({victim.node.name})
        half = Interruption(_half(case), lambda: lose(victim), victims)
        return read_all(case, party, party.hosts, half)


def _half(case: Case) -> float:
    """What the registry has sent in mid-way."""
    return (case.unique_bytes if case.peers else sum(case.wanted_bytes)) / 2


def _fill(case: Case, party: Party, host: Host) -> None:
    """Has one host read all of the image, before anything is measured."""
    before = read_all(case, party, [host])
    if not before.is_right:
        raise NodeFailed(node=host.node.name, command="fill", why="; ".join(before.failures))


def _mount_only(image: Image, host: Host) -> None:
    host.run("mount", f"--driver={host.driver}", "--prefetch=none", image.reference, host.mountpoint(image))


def _wait_until_known(party: Party, image: Image) -> None:
    """Returns when the scheduler has heard that all of the image is somewhere."""
    if party.scheduler is not None:
        wanted = [blob_id for blob_id, _ in image.blobs]
        party.scheduler.wait_until(
            f"all of {image.reference}", lambda status: all(status.has_all_of(blob_id) for blob_id in wanted)
        )


def _judge(
    case: Case, party: Party, measured: Measured, hosts: Sequence[Host], direct_s: float | None = None
) -> Outcome:
    """Asks the hosts that are left."""
    counts = [host.counts(case.image) for host in hosts]
    trouble = [host.peer_counts() for host in hosts] if party.scheduler else []
    return case.judge(measured, counts, trouble, direct_s)
