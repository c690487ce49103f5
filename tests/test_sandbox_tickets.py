"""Tickets are good once and for a while; links are good for a while and for one object."""

from __future__ import annotations

from urllib.parse import parse_qs, quote

import pytest

from branchkey_integrations.sandbox.tickets import DENIED, EXPIRED, GOOD, LinkSigner, TicketOffice


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_ticket_is_good_once() -> None:
    office = TicketOffice(30.0, Clock())
    ticket = office.issue("leaf")
    assert ticket.expires_at == 1030.0
    assert office.redeem(ticket.ticket_id, ticket.request_id) == "leaf"
    assert office.redeem(ticket.ticket_id, ticket.request_id) is None


def test_a_ticket_expires() -> None:
    clock = Clock()
    office = TicketOffice(30.0, clock)
    early, late = office.issue("leaf"), office.issue("leaf")
    clock.now += 29.9
    assert office.redeem(early.ticket_id, early.request_id) == "leaf"
    clock.now += 0.1
    assert office.redeem(late.ticket_id, late.request_id) is None


def test_a_ticket_needs_its_own_request_id_and_is_spent_by_a_wrong_one() -> None:
    office = TicketOffice(30.0, Clock())
    first, second = office.issue("a"), office.issue("b")
    assert office.redeem(first.ticket_id, second.request_id) is None
    assert office.redeem(first.ticket_id, first.request_id) is None
    assert office.redeem("nonsense", "nönsense") is None
    assert office.redeem(second.ticket_id, second.request_id) == "b"


def test_ticket_ids_can_stand_in_a_url_unquoted_and_show_in_no_repr() -> None:
    ticket = TicketOffice(30.0).issue("leaf")
    for value in (ticket.ticket_id, ticket.request_id):
        assert quote(value, safe="") == value
    assert ticket.ticket_id not in repr(ticket)


def test_tickets_that_nobody_uses_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr("branchkey_integrations.sandbox.tickets._MOST_TICKETS", 3)
    clock = Clock()
    office = TicketOffice(30.0, clock)
    tickets = [office.issue(str(index)) for index in range(5)]
    found = [office.redeem(ticket.ticket_id, ticket.request_id) for ticket in tickets]
    assert found == [None, None, "2", "3", "4"]


def parts(query: str) -> tuple[str, str]:
    fields = parse_qs(query)
    return fields["expires"][0], fields["signature"][0]


def test_a_link_is_good_until_it_expires() -> None:
    clock = Clock()
    signer = LinkSigner(900.0, clock)
    expires, signature = parts(signer.query("a1"))
    assert signer.check("a1", expires, signature) == GOOD
    clock.now += 899
    assert signer.check("a1", expires, signature) == GOOD
    clock.now += 1
    assert signer.check("a1", expires, signature) == EXPIRED


@pytest.mark.parametrize("change", ["object", "expires", "signature", "empty"])
def test_a_link_that_was_changed_is_denied(change: str) -> None:
    signer = LinkSigner(900.0, Clock())
    expires, signature = parts(signer.query("a1"))
    asked = {
        "object": ("a2", expires, signature),
        "expires": ("a1", "99999999999", signature),
        "signature": ("a1", expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        "empty": ("a1", "", ""),
    }[change]
    assert signer.check(*asked) == DENIED


def test_a_link_of_another_sandbox_is_denied() -> None:
    expires, signature = parts(LinkSigner(900.0, Clock()).query("a1"))
    assert LinkSigner(900.0, Clock()).check("a1", expires, signature) == DENIED
