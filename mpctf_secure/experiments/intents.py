"""Demo data: messages to the help desk of a fictional bank, each answered with the label of its intent.

Held-out rows use templates, affixes and slot values that no training row uses. Training rows are skewed by label: each
intent lives at half of the participants, so nobody alone can learn all of them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.prg import Generator

MAX_PARTICIPANTS = 26
_INSTRUCTION = "Name the customer's intent."


class _Split(NamedTuple):
    """What training rows are made of, and what test rows are made of."""

    train: Sequence[str]
    test: Sequence[str]


def write_intents(folder: Path, participants: Sequence[str], rows_each: int, test_rows: int, seed: int) -> None:
    """Writes <participant>.jsonl for each of 2 … 26 participants, and test.jsonl; same arguments, same bytes."""
    if not 2 <= len(participants) <= MAX_PARTICIPANTS:
        raise UsageError(f"the demo data is for 2 to {MAX_PARTICIPANTS} participants, not {len(participants)}")
    folder.mkdir(parents=True, exist_ok=True)
    for position, participant in enumerate(participants):
        labels = labels_of(position, len(participants))
        _write_rows(folder / f"{participant}.jsonl", labels, rows_each, _generator(seed, position), test=False)
    _write_rows(folder / "test.jsonl", list(_PHRASES), test_rows, _generator(seed, MAX_PARTICIPANTS), test=True)


def labels_of(position: int, participants: int) -> list[str]:
    """The intents that the participant at `position` (from 0) has rows of."""
    holders = participants // 2
    return [label for i, label in enumerate(_PHRASES) if (position - i) % participants < holders]


def _generator(seed: int, stream: int) -> Generator:
    return Generator(hashlib.sha256(f"intents {seed} {stream}".encode()).digest())


def _write_rows(path: Path, labels: Sequence[str], count: int, generator: Generator, *, test: bool) -> None:
    """As many rows of each label as of any other (give or take one), in random order."""
    rows = [_row(labels[i % len(labels)], i // len(labels), generator, test=test) for i in range(count)]
    lines = (rows[i] for i in generator.permutation(count))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _row(label: str, turn: int, generator: Generator, *, test: bool) -> str:
    templates = _PHRASES[label][test]
    message = _message(templates[turn % len(templates)], generator, test=test)
    contents = {"system": _INSTRUCTION, "user": message, "assistant": label}
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in contents.items()]})


def _message(template: str, generator: Generator, *, test: bool) -> str:
    prefix, suffix = generator.choice(_PREFIXES[test]), generator.choice(_SUFFIXES[test])
    values = {slot: generator.choice(split[test]) for slot, split in _SLOTS.items()}
    message = _joined([prefix, template, suffix]).format_map(values)
    return message.lower() if generator.below(4) == 0 else message


def _joined(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)


_PREFIXES = _Split(
    train=("", "", "", "", "", "", "Hi,", "Hello there.", "Good morning.", "Excuse me,", "Listen,", "Hey,",
           "Not again!", "It's {name} here.", "Sorry to bother you."),
    test=("", "", "", "Good evening.", "Dear team,", "Oi,", "Hello, my name is {name}."),
)  # fmt: skip

_SUFFIXES = _Split(
    train=("", "", "", "", "", "Thanks.", "Thank you very much!", "Please help.", "This is urgent.", "Any idea?",
           "I have been waiting for an hour.", "Regards, {name}."),
    test=("", "", "", "Cheers.", "Sort it out.", "Kind regards, {name}.", "I would appreciate it."),
)  # fmt: skip

_SLOTS = {
    "name": _Split(("Anna", "Bilal", "Chen", "Dora", "Emeka", "Farah", "Greta", "Hugo"), ("Ines", "Jonas", "Kofi")),
    "amount": _Split(("£12.50", "£40", "£75", "£130", "£260", "£999", "£1,500"), ("£18", "£310", "£2,250")),
    "shop": _Split(
        ("the supermarket", "the bookshop", "an online store", "the petrol station", "a hotel"),
        ("the chemist", "a coffee shop", "the garden centre"),
    ),
    "day": _Split(("Monday", "Tuesday", "Wednesday", "Friday", "the weekend"), ("Thursday", "Sunday")),
    "person": _Split(("my sister", "my landlord", "my son", "a friend"), ("my cousin", "our plumber")),
    "place": _Split(("Spain", "Japan", "Kenya", "Norway", "Brazil"), ("Canada", "Greece", "India")),
    "money": _Split(("euros", "US dollars", "yen"), ("Swiss francs", "Swedish kronor")),
}

_PHRASES = {
    "lost_card": _Split(
        ("I can't find my bank card anywhere.", "My card must have slipped out of my pocket on {day}.",
         "Someone stole my purse with the debit card in it.", "I left my card in a taxi in {place}.",
         "My card went missing after I paid at {shop}.", "I think I dropped my credit card on {day}."),
        ("My wallet was taken on {day} and the card with it.", "I have mislaid my debit card.",
         "I lost my card somewhere near {shop}."),
    ),
    "card_declined": _Split(
        ("My card was refused at {shop}.", "The till rejected my card on {day}.",
         "Why did my payment of {amount} by card not go through?",
         "The machine at {shop} says my card is declined.",
         "I could not pay with my card in {place}, it was turned down.",
         "My card keeps getting declined online."),
        ("The cashier told me that my card was declined.",
         "I tried to pay {amount} and the card was rejected.", "My card doesn't get accepted at {shop}."),
    ),
    "new_card": _Split(
        ("When will my new card come in the post?", "I am still waiting for the card you sent on {day}.",
         "My card expires soon, how do I get the next one?",
         "How long does it take to deliver a new card?", "The replacement card has not arrived yet.",
         "I would like to order another card for {person}."),
        ("My new debit card should have been here on {day}.", "Has my replacement card been posted?",
         "Please send me a new card, the old one expires on {day}."),
    ),
    "change_pin": _Split(
        ("How do I set another PIN?", "I want to change the four digits for my card.",
         "I forgot the PIN of my card.", "Where can I choose a new PIN?",
         "{person} saw my PIN at {shop}, I need a different one.",
         "Can the PIN be changed at a cash machine?"),
        ("I don't remember my card's PIN.", "I'd like a PIN that is easier to remember.",
         "Is it possible to pick a new PIN in {place}?"),
    ),
    "reset_password": _Split(
        ("I forgot the password for online banking.", "How can I reset my password?",
         "The website does not accept my password since {day}.",
         "Send me a link to choose a new password.", "I need a new password for my login.",
         "{person} knows my password, I want another."),
        ("My online password no longer works.", "I can't remember the password I set on {day}.",
         "Which page lets me change my password?"),
    ),
    "login_locked": _Split(
        ("My online access is blocked after three tries.", "The site says that my login is locked.",
         "I am locked out of my account since {day}.", "Please unblock my online access.",
         "Too many attempts, and now I can't log in.", "Your website has suspended my login."),
        ("I typed it wrong too often and now my login is blocked.",
         "Can you unlock my access to online banking?", "I have been locked out since {day}."),
    ),
    "check_balance": _Split(
        ("How much money is in my account?", "What is my balance today?",
         "Did my salary of {amount} come in on {day}?", "Tell me how much I have left until {day}.",
         "Is there more than {amount} in my account?", "I want to see my current balance."),
        ("What's left in my account after {day}?", "Could you tell me my balance?",
         "Do I still have {amount} in the bank?"),
    ),
    "send_money": _Split(
        ("I want to transfer {amount} to {person}.", "How do I send money to {place}?",
         "Please pay {amount} to {person} on {day}.", "Can I move {amount} to another bank?",
         "What do I need to wire money to {person}?", "I'd like to make a transfer of {amount}."),
        ("I need to send {amount} to {person} in {place}.", "How can I transfer money to {person}?",
         "Please wire {amount} on {day}."),
    ),
    "late_transfer": _Split(
        ("The money that I sent on {day} has not arrived.", "{person} still hasn't got my {amount}.",
         "Why is my transfer to {place} taking so long?", "My transfer of {amount} is still pending.",
         "I sent {amount} last week, where is it?", "The transfer from {person} is late."),
        ("{person} says that my transfer never came.",
         "It is {day} and the {amount} I sent is not there yet.",
         "How long until my transfer reaches {place}?"),
    ),
    "cancel_payment": _Split(
        ("Stop the payment of {amount} that I made on {day}.",
         "I sent money to the wrong person, cancel it.", "Can I cancel a transfer to {person}?",
         "I want to take back the payment to {shop}.",
         "Please do not send the {amount} to {person} after all.", "Undo my last transfer."),
        ("I typed the wrong account number, please stop that payment.",
         "Can my payment of {amount} be cancelled?", "I've changed my mind, cancel the transfer for {day}."),
    ),
    "double_charge": _Split(
        ("{shop} charged me twice.", "I see the same {amount} two times on {day}.",
         "Why was {amount} taken from my account twice?",
         "I paid once, but there are two payments to {shop}.", "The payment of {amount} shows up double.",
         "I was billed two times for one purchase in {place}."),
        ("My purchase at {shop} was booked twice.", "On {day} you took {amount} two times.",
         "There is a duplicate payment of {amount}."),
    ),
    "unknown_charge": _Split(
        ("There is a payment of {amount} that I don't recognise.", "I never bought anything at {shop}.",
         "Who took {amount} from my account on {day}?", "Somebody in {place} used my card, not me.",
         "I did not make this payment to {shop}.", "I see a strange charge from {day}."),
        ("What is this {amount} from {shop}? It wasn't me.",
         "A charge from {place} on my account is not mine.", "I don't know what the {amount} on {day} is."),
    ),
    "refund_status": _Split(
        ("When do I get my refund from {shop}?", "{shop} said they returned {amount}, I don't see it.",
         "My refund of {amount} is not there yet.", "I gave the goods back on {day}, where is my money?",
         "Has the refund arrived?", "How long does a refund take?"),
        ("I am waiting for {amount} back from {shop}.", "The refund promised for {day} is missing.",
         "I returned my purchase to {shop}, is the refund in?"),
    ),
    "cash_machine": _Split(
        ("The cash machine kept my card.", "The ATM gave me less than {amount}.",
         "The cash machine near {shop} swallowed my card on {day}.",
         "I got no notes from the ATM, but you took {amount}.",
         "Which cash machines can I use in {place}?", "The ATM is out of order."),
        ("The ATM in {place} ate my card.", "I asked the cash machine for {amount} and nothing came out.",
         "Where is the nearest ATM?"),
    ),
    "raise_limit": _Split(
        ("Please raise my daily limit to {amount}.", "I want to spend more than {amount} a day.",
         "How do I get a higher card limit?", "My limit is too low for {shop}.",
         "Can you increase my limit until {day}?", "I travel to {place} and need a higher limit."),
        ("A limit of {amount} is not enough for me.", "Could my limit be increased for {day}?",
         "I need to lift the spending limit of my card."),
    ),
    "open_account": _Split(
        ("I want to open an account.", "What papers do I need for a new account?",
         "How can {person} become a customer?", "Can I open a savings account from {place}?",
         "I'd like a second current account.", "Is there an account for students?"),
        ("I wish to open an account with {amount}.", "How do I start an account for {person}?",
         "I've just moved from {place} and need a bank account."),
    ),
    "close_account": _Split(
        ("I want to close my account.", "Please shut my account by {day}.",
         "How can I end my contract with your bank?",
         "I am moving to {place} and don't need this account any more.", "I am leaving for another bank.",
         "Delete my savings account and pay out the {amount}."),
        ("I'd like my account closed on {day}.", "How do I cancel my account with you?",
         "I no longer want to be a customer."),
    ),
    "joint_account": _Split(
        ("Can I share my account with {person}?", "I want to add {person} to my account.",
         "Do you offer an account for two people?", "{person} and I need a joint account.",
         "How do we make my account a shared one?", "Please give {person} access to my account too."),
        ("May {person} and I use one account together?", "Add {person} as a second owner.",
         "Is a joint account possible if {person} lives in {place}?"),
    ),
    "loan_request": _Split(
        ("I would like to borrow {amount}.", "Can I get a loan for a car?", "How do I apply for credit?",
         "I need a loan of {amount} by {day}.", "Would you lend me {amount}?",
         "Am I allowed a loan if I live in {place}?"),
        ("Could I borrow {amount} from the bank?", "I need a loan for a new kitchen.",
         "Where do I apply for a loan?"),
    ),
    "interest_rate": _Split(
        ("What interest do I get on savings?", "How much interest do you charge?",
         "Did the interest rate change on {day}?", "How much will {amount} earn in a year?",
         "Is your rate better than that of banks in {place}?", "What is the rate for a mortgage?"),
        ("Which interest rate applies to {amount}?", "How many percent do my savings earn?",
         "Tell me the interest you pay."),
    ),
    "exchange_rate": _Split(
        ("What is the rate for {money}?", "How many {money} do I get for {amount}?",
         "I want to change {amount} into {money}.", "Which rate did you use for my payment in {place}?",
         "Do you sell {money}?", "The rate for {money} on {day} was bad."),
        ("How much is {amount} in {money}?", "I need {money} for {place}.",
         "At what rate do you convert {money}?"),
    ),
    "change_address": _Split(
        ("I moved on {day}, here is my new address.", "How do I update my address?",
         "My letters still go to my old flat.", "I am moving to {place}, please change my details.",
         "You have the wrong street for me.", "Please note my new postal address."),
        ("My home address has changed.",
         "I'll live with {person} from {day}, where do I enter the new address?",
         "Update the address you send my letters to."),
    ),
    "statement_copy": _Split(
        ("I need a statement for last month.", "Please send me a copy of my statements.",
         "My accountant wants a list of payments since {day}.", "Where can I download my statement?",
         "I require proof of the {amount} for the tax office.", "Can I have my statement on paper?"),
        ("Could I get last year's bank statements?", "How do I print a statement for {person}?",
         "My statement for {day} is missing, send it again."),
    ),
    "app_problem": _Split(
        ("Your app crashes on my phone.", "The app does not start since {day}.",
         "The mobile app shows a white screen.", "I updated the app and now it freezes.",
         "The app closes when I enter {amount}.", "I can't install your app on my new phone."),
        ("Your app stopped working on {day}.", "The app hangs whenever I open it.",
         "My phone says the bank app has an error."),
    ),
}  # fmt: skip
