"""`mpctf-secure enroll`: the steps of the key ceremony, each of which reads and writes small files."""

import datetime
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mpctf_secure import files
from mpctf_secure.attestation.measurement import measure_package
from mpctf_secure.auditlog.own_events import KeysDrawn, KeysOpened, Requested, RosterInstalled, RosterSigned
from mpctf_secure.cli import passphrase, telephone
from mpctf_secure.cli.models import builtin_config
from mpctf_secure.cli.options import Format, PassphraseFd
from mpctf_secure.cli.own_log import own_log
from mpctf_secure.cli.text import one_line
from mpctf_secure.config.address import check_address
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.hazmat.passphrase import STRONG
from mpctf_secure.identity import enrollment, keystore
from mpctf_secure.identity.ceremony import NONCE_BYTES
from mpctf_secure.identity.certificate import Role
from mpctf_secure.identity.documents import Document, Organisation, Request, RosterBody, SignedRoster, Vote, from_time
from mpctf_secure.identity.keys import Keys

app = typer.Typer(
    no_args_is_help=True,
    help="Key ceremony: organisations admit each other. The steps: init, request, compare, sign, verify.",
)

KeysFolder = Annotated[Path, typer.Option("--keys", help="Folder of this organisation's keys.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How many days the request, and so the roster, is good for.")]
Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="Files of the ceremony, in any order.")]


def _address(text: str) -> str:
    try:
        return check_address(text)
    except ValueError as error:
        raise UsageError(f"{text}: {error}", hint="for example 192.0.2.1:8444") from error


MailboxAddress = Annotated[
    str, typer.Option("--to", metavar="IP:PORT", callback=_address, help="Where the coordinator's mailbox is.")
]
CoordinatorFile = Annotated[Path, typer.Option(metavar="FILE", help="The coordinator's request file.")]

_CLOCK_SKEW = datetime.timedelta(hours=1)
_LEAST_LIFE = datetime.timedelta(days=7)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Short name, for example hospital-a.")],
    coordinator: Annotated[bool, typer.Option("--coordinator", help="This organisation runs the coordinator.")] = False,
    keys: KeysFolder = Path("keys"),
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Make this organisation's keys, sealed under a passphrase, and a commented site.yaml.

    Example: mpctf-secure enroll init hospital-a
    """
    role: Role = "coordinator" if coordinator else "participant"
    organisation = _organisation(name, role)
    if keys.exists():
        raise UsageError(f"{keys}: exists already", hint="keys are never overwritten; name another folder with --keys")
    drawn = keystore.create(keys, organisation, passphrase.read(passphrase_fd, new=True), STRONG)
    own_log(keys, drawn).sign(drawn.log)
    typer.echo(f"keys of {name} in {keys}; write the passphrase down, nobody can restore it")
    _write_config("site" if role == "participant" else "run", keys)
    typer.echo("next: mpctf-secure enroll request")


@app.command()
def request(keys: KeysFolder = Path("keys"), days: Days = 365, passphrase_fd: PassphraseFd = None) -> None:
    """Write NAME.request.json: the public keys, for everybody else.

    Example: mpctf-secure enroll request
    """
    owner = keystore.organisation(keys)
    path = Path(f"{owner.name}.request.json")
    if path.exists():
        raise UsageError(
            f"{path}: exists already, and another would have other words",
            hint="send this one; `enroll renew` makes one with a later end",
        )
    renew(keys, days, passphrase_fd)


@app.command()
def renew(keys: KeysFolder = Path("keys"), days: Days = 365, passphrase_fd: PassphraseFd = None) -> None:
    """Write a new NAME.request.json with the same keys and a later end, before the roster expires.

    Example: mpctf-secure enroll renew
    """
    _refuse_pending(keys)
    held = keystore.unseal(keys, passphrase.read(passphrase_fd))
    _write_request(keys, held, held, days)


@app.command()
def rotate(keys: KeysFolder = Path("keys"), days: Days = 365, passphrase_fd: PassphraseFd = None) -> None:
    """Make new keys and write NAME.request.json; in force once a roster has them, on which the others heard you.

    Example: mpctf-secure enroll rotate
    """
    _signed(keys)  # with no roster yet, two identities in one folder would both be in question
    _refuse_pending(keys)
    phrase = passphrase.read(passphrase_fd)
    held = keystore.unseal(keys, phrase)  # one passphrase for old and new
    drawn = keystore.draw(keys, phrase, STRONG)
    own_log(keys).append(KeysDrawn(identity=drawn.identity.public.hex()))
    _write_request(keys, held, drawn, days)


def _refuse_pending(keys: Path) -> None:
    """A request of the old keys would undo a rotation, and the pending keys may be those that a thief has read."""
    if keystore.identities(keys) and (pending := keystore.pending(keys)):
        raise UsageError(
            f"{pending}: a rotation to these keys is not finished",
            hint=f"go on with its request file; or remove {pending}, and rotate again",
        )


@app.command()
def compare(
    inputs: Files,
    without: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Who leaves in the same step.")] = None,
    keys: KeysFolder = Path("keys"),
) -> None:
    """Make the next roster from request files, and hear on the telephone that others made the same one.

    A newcomer adds the signed roster that its request is for.

    Example: mpctf-secure enroll compare *.request.json
    """
    documents = [keystore.load_any(path) for path in inputs]
    current = keystore.installed(keys)
    previous = current.roster if current else _given_roster(documents)
    requests = [one for one in documents if isinstance(one, Request)]
    if not requests:
        raise UsageError("no request file among these", hint="mpctf-secure enroll compare *.request.json")
    roster, me = enrollment.next_roster(previous, requests, without or []), keystore.organisation(keys).name
    if me not in {member.name for member in roster.members}:
        raise UsageError(f"{me} is in none of these requests", hint=f"add {me}.request.json")
    keystore.check_mine(keys, roster)
    path = _write(Path(f"roster-{roster.version}.json"), roster)
    telephone.show_changes(previous, roster)
    telephone.show_programs(roster, me)
    telephone.show_words(roster, me)
    to_hear = _to_hear(current.roster if current else None, roster, me)
    for name in to_hear:
        if name not in keystore.heard(keys, roster.hash.hex()) and telephone.hear(name, roster, me):
            keystore.note_heard(keys, roster.hash.hex(), [name])
    missing = sorted(set(to_hear) - set(keystore.heard(keys, roster.hash.hex())))
    if missing:
        typer.echo(f"not heard yet: {', '.join(missing)}; the same command again when you have them on the telephone")
    else:
        typer.echo(f"next: mpctf-secure enroll sign {path}")


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Who is to leave.")], keys: KeysFolder = Path("keys")) -> None:
    """Write the next roster without a member; whoever agrees signs it.

    Example: mpctf-secure enroll revoke bank-b
    """
    current = _installed(keys)
    roster = enrollment.next_roster(current, [], [name])
    path = Path(f"roster-{roster.version}.json")
    if path.exists() and path.read_bytes() != roster.encode():
        raise UsageError(f"{path}: another roster of this version is here", hint=f"remove {path} if it is void")
    _write(path, roster)
    telephone.show_changes(current, roster)
    if note := enrollment.needs_leaver(current, name):
        typer.echo(note)
    typer.echo(f"next: send {path} to everybody; mpctf-secure enroll sign {path}")


@app.command()
def sign(
    roster_file: Annotated[Path, typer.Argument(metavar="ROSTER.json", help="What compare or revoke wrote.")],
    keys: KeysFolder = Path("keys"),
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Sign a roster whose words were compared; the signature names whom you heard.

    Example: mpctf-secure enroll sign roster-1.json
    """
    roster, me = keystore.load_document(roster_file, RosterBody), keystore.organisation(keys).name
    current = keystore.installed(keys)
    previous = current.roster if current else None
    if previous:
        enrollment.verify_follows(previous, roster)
    else:
        enrollment.verify_form(roster)
    keystore.check_mine(keys, roster)
    heard = keystore.heard(keys, roster.hash.hex())
    missing = sorted(set(_to_hear(previous, roster, me)) - set(heard))
    if len(missing) > (0 if roster.version == 1 else 1):  # later, one of a quorum may be out of reach
        raise SecurityError(
            f"{roster_file}: you have not heard the words of {', '.join(missing)}",
            hint="mpctf-secure enroll compare with the request files, on the telephone; it counts for this very roster",
        )
    _check_dates(previous, roster)
    telephone.show_changes(previous, roster)
    phrase = passphrase.read(passphrase_fd)
    held = set(keystore.identities(keys))
    for identity in held.intersection(enrollment.signing_identities(me, roster, previous)):
        unsealed = keystore.unseal(keys, phrase, identity)
        own = own_log(keys, unsealed)
        own.append(KeysOpened(command="enroll sign"))
        vote = enrollment.vote(roster, unsealed, heard)
        keystore.keep_vote(keys, roster.version, vote)
        own.append(RosterSigned(version=roster.version, roster=roster.hash.hex(), heard=vote.heard))
        old = "" if identity.hex() in {member.identity for member in roster.members} else ".old-keys"
        path = _write(Path(f"roster-{roster.version}.{me}{old}.signature.json"), vote)
        typer.echo(f"next: send {path} to everybody")
    before = "" if current or roster.version == 1 else f"roster-{roster.version - 1}.signed.json "
    typer.echo(f"then: mpctf-secure enroll verify {before}{roster_file} *.signature.json")


@app.command()
def verify(inputs: Files, keys: KeysFolder = Path("keys")) -> None:
    """Check a roster with everybody's signatures and install it: from now on no older one is accepted.

    Example: mpctf-secure enroll verify roster-1.json *.signature.json
    """
    documents = [keystore.load_any(path) for path in inputs]
    complete = [one for one in documents if isinstance(one, SignedRoster)]
    bodies = {one.hash: one for one in (*(one.roster for one in complete), *documents) if isinstance(one, RosterBody)}
    loose = [one for one in documents if isinstance(one, Vote)]
    votes = [*loose, *(vote for one in complete for vote in one.signatures)]
    current = keystore.installed(keys)
    before = {one.version + 1: one for one in (*bodies.values(), *([current.roster] if current else []))}
    gathered = [_gather(body, votes, before.get(body.version)) for body in bodies.values()]
    installed = keystore.install(keys, gathered)
    signed = _signed(keys)
    event = RosterInstalled(version=installed.version, roster=installed.hash.hex())
    own_log(keys).append(event)
    path = _write(Path(f"roster-{installed.version}.signed.json"), signed)
    typer.echo(
        f"roster version {installed.version} is installed: {len(installed.members)} members, "
        f"until {installed.expires:%Y-%m-%d}, hash {installed.hash.hex()[:16]}…; {path} is the same in one file"
    )
    coordinator = keystore.organisation(keys).role == "coordinator"
    typer.echo(f"next: mpctf-secure {'start run.yaml' if coordinator else 'doctor site.yaml'}")


@app.command()
def show(
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE…]", help="Files; none: what is installed.")
    ] = None,
    keys: KeysFolder = Path("keys"),
    output: Annotated[Format, typer.Option("--format", help="json: the documents.")] = Format.TEXT,
) -> None:
    """Show a request, a roster with its words, or who signed.

    Example: mpctf-secure enroll show roster-1.json
    """
    documents = [keystore.load_any(path) for path in inputs] if inputs else [_signed(keys)]
    for document in documents:
        if output is Format.JSON:
            typer.echo(document.encode(), nl=False)
        else:
            telephone.show(document, keystore.organisation(keys).name)


@app.command()
def mailbox(
    listen: Annotated[
        str, typer.Argument(metavar="IP:PORT", callback=_address, help="Where to listen; not the port of runs.")
    ],
    keys: KeysFolder = Path("keys"),
    folder: Annotated[Path, typer.Option(help="Where the files are kept.")] = Path("mailbox"),
    passphrase_fd: PassphraseFd = None,
) -> None:
    """At the coordinator: let anybody leave and fetch ceremony files until interrupted. Nobody trusts what is in it.

    Example: mpctf-secure enroll mailbox 192.0.2.1:8444
    """
    from mpctf_secure.cli.post import serve_mailbox  # noqa: PLC0415 - --help must not wait for grpc

    owner = keystore.organisation(keys)
    if owner.role != "coordinator":
        raise UsageError(f"{owner.name} is no coordinator", hint="the coordinator's address and key are known to all")
    serve_mailbox(listen, owner, keystore.unseal(keys, passphrase.read(passphrase_fd)), folder)


@app.command()
def send(inputs: Files, address: MailboxAddress, coordinator: CoordinatorFile) -> None:
    """Leave files in the coordinator's mailbox.

    Example: mpctf-secure enroll send bank-b.request.json --to 192.0.2.1:8444 --coordinator registry-x.request.json
    """
    from mpctf_secure.cli.post import send_files  # noqa: PLC0415

    send_files({path: keystore.load_any(path) for path in inputs}, address, _load_request(coordinator))


@app.command()
def fetch(address: MailboxAddress, coordinator: CoordinatorFile) -> None:
    """Fetch everybody's files from the coordinator's mailbox; files that are here are never changed.

    Example: mpctf-secure enroll fetch --to 192.0.2.1:8444 --coordinator registry-x.request.json
    """
    from mpctf_secure.cli.post import fetch_files  # noqa: PLC0415

    fetch_files(address, _load_request(coordinator))


def _gather(roster: RosterBody, votes: Iterable[Vote], previous: RosterBody | None) -> SignedRoster:
    """A roster with all good signatures among these; one that anybody could have made stops nobody."""
    roster_hash = roster.hash
    good: dict[str, Vote] = {}
    for vote in votes:
        if vote.roster != roster_hash.hex():
            continue
        try:
            enrollment.verify_vote(vote, roster_hash, roster, previous)
        except SecurityError as error:
            typer.echo(one_line(f"left out: {error.message}"))
            continue
        if vote.signer not in good or len(vote.heard) > len(good[vote.signer].heard):
            good[vote.signer] = vote
    return enrollment.collect(roster, good.values())


def _load_request(path: Path) -> Request:
    request = keystore.load_document(path, Request)
    enrollment.verify_request(request)
    return request


def _organisation(name: str, role: Role) -> Organisation:
    try:
        return Organisation(name=name, role=role)
    except ValueError as error:
        raise UsageError(
            f"{name!r} is no name for an organisation", hint="small letters, digits and hyphens, as in hospital-a"
        ) from error


def _write_config(kind: str, keys: Path) -> None:
    """A commented site.yaml or run.yaml beside the keys."""
    path = keys.resolve().parent / f"{kind}.yaml"
    if path.exists():
        typer.echo(f"{path} is there already and stays as it is")
        return
    template = builtin_config(kind).read_text(encoding="utf-8")
    path.write_text(template.replace("keys: keys", f"keys: {keys.name}"), encoding="utf-8")
    typer.echo(f"{path}: put in your own addresses, names and folders")


def _write_request(folder: Path, held: Keys, asked: Keys, days: int) -> None:
    """`held`: the keys in force, `asked`: those that the request is for."""
    owner, now = keystore.organisation(folder), datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    nonce = os.urandom(NONCE_BYTES)
    made = enrollment.make_request(asked, owner.name, owner.role, now, end, nonce, measure_package())
    own = own_log(folder, held)
    own.append(Requested(request=made.hash.hex(), expires=made.expires))
    own.sign(held.log)
    path = _write(Path(f"{owner.name}.request.json"), made)
    typer.echo(f"next: send {path} to everybody, by any way; mpctf-secure enroll compare *.request.json")


def _write(path: Path, document: Document) -> Path:
    """Files of the ceremony go to the current folder; they are public, and the same content may be written again."""
    with files.writing(path):
        files.replace(path, document.encode())
    return path


def _installed(keys: Path) -> RosterBody:
    return _signed(keys).roster


def _signed(keys: Path) -> SignedRoster:
    current = keystore.installed(keys)
    if current is None:
        raise UsageError(f"{keys}: no roster is installed", hint="mpctf-secure enroll verify")
    return current


def _check_dates(previous: RosterBody | None, roster: RosterBody) -> None:
    """An end that is near stops everybody; a beginning in the future is somebody's wrong clock.

    What is in force already is let alone: the removal of a member waits for nobody's renewal.
    """
    now = datetime.datetime.now(datetime.UTC)
    known = previous.members if previous else ()
    for member in (one for one in roster.members if one not in known):
        if from_time(member.created) > now + _CLOCK_SKEW:
            raise SecurityError(
                f"the request of {member.name} is of {member.created}, in the future",
                hint="one of the two clocks is wrong",
                culprits=[member.name],
            )
        if from_time(member.expires) < now + _LEAST_LIFE:
            raise SecurityError(
                f"the request of {member.name} ends on {member.expires[:10]}, and the roster with it",
                hint=f"mpctf-secure enroll renew at {member.name}",
                culprits=[member.name],
            )


def _given_roster(documents: Iterable[Document]) -> RosterBody | None:
    """The roster that a newcomer was sent beside the requests."""
    rosters = [one.roster for one in documents if isinstance(one, SignedRoster)]
    return max(rosters, key=lambda roster: roster.version) if rosters else None


def _to_hear(previous: RosterBody | None, roster: RosterBody, me: str) -> list[str]:
    return [name for name in enrollment.newcomers(previous, roster) if name != me]
