"""A look at the coordinator's port: does it answer, in TLS 1.3, with the coordinator's certificate, and like ours?"""

import datetime
import os
import socket
import ssl

from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.identity import certificate
from mpctf_secure.identity.certificate import TlsKey
from mpctf_secure.identity.roster import Member

_SECONDS = 5.0


class NobodyListensError(EnvironmentUnfitError):
    """The machine answers and the port is closed."""


def probe(address: str, coordinator: Member, now: datetime.datetime) -> str:
    """What answers at IP:port; EnvironmentUnfitError if nothing does, SecurityError if it is not the coordinator.

    Sends no certificate: the server shows its own first, and then hangs up.
    """
    context = _context()
    context.verify_mode = (
        ssl.CERT_NONE
    )  # checked below, against the roster: its authorities are Ed25519 and in no store
    try:
        with _connect(address) as raw, context.wrap_socket(raw) as secured:
            der, version = secured.getpeercert(binary_form=True) or b"", secured.version()
    except ssl.SSLEOFError as error:
        raise EnvironmentUnfitError(f"{address}: cut off", hint="is the network stable?") from error
    except ssl.SSLError as error:
        raise SecurityError(
            f"{address} does not speak TLS 1.3: {error.reason}", hint="is this the coordinator's port?"
        ) from error
    except ConnectionRefusedError as error:
        raise NobodyListensError(
            f"{address}: the machine is there, and nothing listens", hint="the coordinator does while a run is on"
        ) from error
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{address}: {error.strerror or 'no answer'}",
            hint="is the address right? then ask both firewalls for this one outbound port",
        ) from error
    certificate.issuer(ssl.DER_cert_to_PEM_cert(der).encode(), {coordinator.identity: coordinator.role}, now)
    return f"{coordinator.name} answers at {address} in {version}"


def hangs_up(address: str, coordinator: Member, own: TlsKey) -> bool:
    """Whether the coordinator ends a connection because of our certificate, which gRPC does without an alert.

    In TLS 1.3 it looks at ours when the handshake is over for us. Nobody else is shown it.
    """
    context = _context()
    context.load_verify_locations(cadata=certificate.trust_anchor(coordinator.identity).decode())
    # The standard library takes keys from files alone: this one is in memory, and gone with its descriptor.
    with os.fdopen(os.memfd_create("tls"), "wb") as file:
        file.write(own.private + own.certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    try:
        with _connect(address) as raw, context.wrap_socket(raw) as secured:
            return not secured.recv(1)
    except OSError:
        return False


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a key counts, not a name
    context.set_alpn_protocols(["h2"])
    return context


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), _SECONDS)
