"""IP literal and port, as listeners and dialers take them."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator

_HIGHEST_PORT = 65535


def check_address(text: str) -> str:
    """The same text; ValueError unless it is IPv4:port. gRPC itself would take port 99999 for 34463."""
    host, _, port = text.rpartition(":")
    try:
        ipaddress.IPv4Address(host)
        good = port.isascii() and port.isdigit() and int(port) <= _HIGHEST_PORT
    except ValueError:
        good = False
    if not good:
        raise ValueError("not an IP address and port, as in 192.0.2.1:8443")
    return text


Address = Annotated[str, AfterValidator(check_address)]
