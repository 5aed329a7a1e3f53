"""Rank 0's way to its agent over a network on which everybody may dial."""

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.training.channel import JobChannel
from mpctf_secure.training.launch import endpoint, ticket
from mpctf_secure.training.launch.endpoint import Endpoint
from mpctf_secure.training.launch.ticket import Credentials, Ticket

Attack = Callable[[Ticket], socket.socket]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Endpoint]:
    with endpoint.tls("127.0.0.1", tmp_path) as agent:
        yield agent


def read(path: Path) -> Ticket:
    return Ticket(**json.loads(path.read_text()))


def accept(agent: Endpoint) -> socket.socket:
    while True:
        if connection := agent.accept(0.1):
            return connection


def meet(agent: Endpoint) -> tuple[JobChannel, JobChannel]:
    """The agent's end and rank 0's."""
    dialled: list[socket.socket] = []
    rank_0 = threading.Thread(target=lambda: dialled.append(endpoint.dial(agent.path)))
    rank_0.start()
    connection = accept(agent)
    rank_0.join()
    return JobChannel(connection), JobChannel(dialled[0])


def check_talk(agent: JobChannel, rank_0: JobChannel) -> None:
    vector = np.arange(100_000, dtype=np.float32)
    sender = threading.Thread(target=lambda: agent.send({"rows": [1]}, vector))
    sender.start()
    header, body = rank_0.receive()
    sender.join()
    assert header == {"rows": [1]}
    assert np.array_equal(body, vector)
    rank_0.send({"loss": 1.0})
    assert agent.receive()[0] == {"loss": 1.0}
    agent.close()
    with pytest.raises(EnvironmentUnfitError):
        rank_0.receive()
    rank_0.close()


def connect(its: Ticket) -> socket.socket:
    return socket.create_connection((its.address, its.port))


def say_garbage(its: Ticket) -> socket.socket:
    connection = connect(its)
    with contextlib.suppress(OSError):  # sent away while it still speaks
        connection.sendall(os.urandom(1000))
    return connection


def speak_without_tls(its: Ticket) -> socket.socket:
    connection = connect(its)
    with contextlib.suppress(EnvironmentUnfitError):  # sent away while it still speaks
        JobChannel(connection).send({"schema": []})
    return connection


def shake_hands(its: Ticket, context: ssl.SSLContext) -> socket.socket:
    """As far as it goes: what a stranger still sends is for the agent to refuse."""
    connection = context.wrap_socket(connect(its), do_handshake_on_connect=False)
    with contextlib.suppress(OSError):
        connection.do_handshake()
        connection.sendall(b"let me in")
    return connection


def show_another_certificate(its: Ticket) -> socket.socket:
    return shake_hands(its, ticket.make_context(ssl.PROTOCOL_TLS_CLIENT, Credentials.draw("rank 0"), its.agent))


def show_no_certificate(its: Ticket) -> socket.socket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=its.agent)
    return shake_hands(its, context)


def speak_an_old_tls(its: Ticket) -> socket.socket:
    """With the right certificate."""
    context = ticket.make_context(ssl.PROTOCOL_TLS_CLIENT, Credentials(its.private, its.certificate), its.agent)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return shake_hands(its, context)


def hang_up(its: Ticket) -> socket.socket:
    connection = connect(its)
    connection.close()
    return connection


ATTACKS = {
    "silence": connect,
    "garbage": say_garbage,
    "no TLS": speak_without_tls,
    "another certificate": show_another_certificate,
    "no certificate": show_no_certificate,
    "TLS 1.2 with the right certificate": speak_an_old_tls,
    "hanging up": hang_up,
}


def suffer(agent: Endpoint, attack: Attack) -> socket.socket:
    """The attacker's connection, when it has done all it can."""
    attacked: list[socket.socket] = []
    attacker = threading.Thread(target=lambda: attacked.append(attack(read(agent.path))))
    attacker.start()
    while attacker.is_alive():
        assert agent.accept(0.05) is None
    for _ in range(3):
        assert agent.accept(0.05) is None
    return attacked[0]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_stranger_neither_takes_rank_0s_place_nor_keeps_it_out(agent: Endpoint, attack: Attack) -> None:
    with suffer(agent, attack):
        check_talk(*meet(agent))


def test_stranger_is_taken_for_rank_0_once_certificates_are_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking = ticket.make_context

    def unchecking(protocol: int, own: Credentials, peer: str) -> ssl.SSLContext:
        context = checking(protocol, own, peer)
        context.verify_mode = ssl.CERT_NONE
        return context

    monkeypatch.setattr(ticket, "make_context", unchecking)
    with endpoint.tls("127.0.0.1", tmp_path) as agent:
        stranger = threading.Thread(target=lambda: show_another_certificate(read(agent.path)).close())
        stranger.start()
        accept(agent).close()
        stranger.join()


def test_crowd_of_silent_strangers_does_not_keep_rank_0_out(agent: Endpoint) -> None:
    with contextlib.ExitStack() as crowd:
        for _ in range(ticket.MOST_GUESTS + 50):
            crowd.enter_context(connect(read(agent.path)))
            assert agent.accept(0.05) is None
        check_talk(*meet(agent))


def test_silent_stranger_is_sent_away_in_the_end(agent: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket, "HANDSHAKE_SECONDS", 0.0)
    with suffer(agent, connect) as stranger:
        assert stranger.recv(1) == b""


def test_rank_0_does_not_speak_to_somebody_in_the_agents_place(
    agent: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket, "_DIAL_SECONDS", 0.0)
    (tmp_path / "other").mkdir()
    with endpoint.tls("127.0.0.1", tmp_path / "other") as other:
        moved = read(agent.path)._replace(port=read(other.path).port)
        agent.path.write_text(json.dumps(moved._asdict()))
        failed: list[EnvironmentUnfitError] = []

        def dial() -> None:
            with pytest.raises(EnvironmentUnfitError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                endpoint.dial(agent.path)
            failed.append(caught.value)

        rank_0 = threading.Thread(target=dial)
        rank_0.start()
        while rank_0.is_alive():
            assert other.accept(0.05) is None
    assert "slurm.listen" in failed[0].hint


def test_ticket_is_the_owners_alone_and_there_no_longer_than_needed(tmp_path: Path) -> None:
    (tmp_path / "agent-0123.tls").touch()  # of an agent that was killed
    with endpoint.tls("127.0.0.1", tmp_path) as agent:
        assert list(tmp_path.iterdir()) == [agent.path]
        assert agent.path.stat().st_mode & 0o777 == 0o600
        its = read(agent.path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConnectionRefusedError):
        connect(its)


def test_each_start_has_keys_of_its_own(tmp_path: Path) -> None:
    tickets = []
    for _ in range(2):
        with endpoint.tls("127.0.0.1", tmp_path) as agent:
            tickets.append(read(agent.path))
    first, second = tickets
    assert len({first.private, second.private}) == len({first.agent, second.agent}) == 2


@pytest.mark.parametrize("address", ["::1", "127.0.0.2"])
def test_agent_listens_where_it_is_told_to(tmp_path: Path, address: str) -> None:
    with endpoint.tls(address, tmp_path) as agent:
        assert read(agent.path).address == address
        check_talk(*meet(agent))


def test_address_of_another_machine_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"slurm.listen: 192\.0\.2\.1"), endpoint.tls("192.0.2.1", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["job.sock", "agent-0123.tls"])
def test_agent_that_is_gone_is_said_to_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(EnvironmentUnfitError, match="no agent at"):
        endpoint.dial(tmp_path / name)


def test_both_kinds_of_endpoint_lead_to_a_channel() -> None:
    with endpoint.unix() as agent:
        assert agent.accept(0.05) is None
        check_talk(*meet(agent))


def test_what_tls_has_decrypted_already_is_not_waited_for(agent: Endpoint) -> None:
    """Two frames in one record: `select` sees nothing of the second once the first is read."""
    dialled: list[socket.socket] = []
    rank_0 = threading.Thread(target=lambda: dialled.append(endpoint.dial(agent.path)))
    rank_0.start()
    with accept(agent) as connection:
        rank_0.join()
        with dialled[0] as other:
            other.sendall(b"ab")
            assert endpoint.wait_readable(connection, 10.0)
            assert connection.recv(1) == b"a"
            assert endpoint.wait_readable(connection, 0.0)
            assert connection.recv(1) == b"b"
            assert not endpoint.wait_readable(connection, 0.0)
