"""Names of things, as types, so that one kind never passes for another."""

import re
from typing import NewType

ParticipantName = NewType("ParticipantName", str)
"""An organisation's short name in files and on the terminal, for example hospital-a."""

IdentityKey = NewType("IdentityKey", bytes)
"""32 bytes: the Ed25519 public key that is the organisation in every protocol message."""

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""What names of participants and runs look like: a DNS label, safe in paths and certificates."""
