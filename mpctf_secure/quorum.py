"""How many must agree so that no two contrary decisions both find enough, of members of whom some may collude."""

PAIR = 2


def default_colluders(members: int) -> int:
    """How many members may collude with a malicious coordinator unless a contract says otherwise; none of a pair."""
    return 0 if members <= PAIR else min(max(1, (members - 1) // 3), members - 2)


def default_quorum(members: int, colluders: int) -> int:
    """⌊(N + c)/2⌋ + 1: two such groups share more than c members, so an honest one, who does not decide twice."""
    return (members + colluders) // 2 + 1
