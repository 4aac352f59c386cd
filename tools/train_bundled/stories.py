"""Random stories with two to four names, in which the receiver is the one name that is not repeated.

Two names alone teach a relay: the repeated name gathers the other one and the last token copies it from
there. So most stories have three or four names, and in many of them the receiver is named after the giver's
last mention; then only "attend to the names, but not to a repeated one" gives the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

ONE = (
    "{0} was at the {PLACE}", "{0} left", "{0} was tired", "{0} went home early", "{0} found a {OBJECT}",
    "{0} arrived at the {PLACE}", "{0} was gone", "{0} came back", "{0} was there too", "{0} was in the {PLACE}",
    "{0} wanted a {OBJECT}", "{0} was thinking about the {PLACE}", "{0} was quiet", "{0} had lunch",
    "{0} got a {OBJECT}", "{0} was going home", "{0} was thinking about going to the {PLACE}",
)  # fmt: skip
TWO = (
    "{0} and {1} went to the {PLACE}", "{0} met {1}", "{0} talked with {1}", "{0} saw {1} at the {PLACE}",
    "{0} thanked {1}", "{0} was talking with {1} near the {PLACE}", "{0} and {1} were friends",
    "{0} and {1} had a lot of fun", "{0} had an argument with {1}", "{0} and {1} were working in the {PLACE}",
    "{0} left the {PLACE} with {1}", "the {PLACE} was full of friends of {0} and {1}", "{0} met {1} near the {PLACE}",
    "{0} and {1} found a {OBJECT} in the {PLACE}", "{0} walked to the {PLACE} with {1}", "there were {0} and {1}",
    "the {PLACE} was quiet when {0} met {1}", "{0} and {1} were going to the {PLACE}",
)  # fmt: skip
THREE = (
    "{0}, {1} and {2} went to the {PLACE}", "{0}, {1} and {2} were at the {PLACE}", "{0} met {1} and {2}",
    "{0} and {1} saw {2} at the {PLACE}", "there were {0}, {1} and {2}", "{0} and {1} talked with {2}",
    "{0} was thinking about {1} and {2}", "{0} came back from the {PLACE} with {1} and {2}",
)  # fmt: skip
OPENERS = (
    "", "", "Then, ", "Today ", "Yesterday ", "Earlier ", "Later ", "In the end ", "After lunch ", "Once ", "So ",
    "Afterwards ", "In the {PLACE} ", "At the {PLACE} ",
)  # fmt: skip
SUBORDINATES = ("When ", "After ", "While ", "Because ", "As ", "Once ")
JOINTS = (
    ". ",
    ", and ",
    ", so ",
    ", but ",
    ". Then ",
    ". Later ",
    ", and then ",
    ". So ",
    ". Afterwards ",
    ". In the end ",
)
GIVES = (
    "gave a {OBJECT}", "handed a {OBJECT}", "sent a {OBJECT}", "passed a {OBJECT}", "offered a {OBJECT}",
    "brought a {OBJECT}", "showed a {OBJECT}", "wanted to give a {OBJECT}", "decided to give a {OBJECT}", "gave it",
    "decided to give it", "sold a {OBJECT}", "wanted to send it", "spent some time and gave a {OBJECT}",
)  # fmt: skip
LATE = (
    "{0} saw {1} and {GIVE} to", "{0} met {1} at the {PLACE} and {GIVE} to", "{0} thanked {1} and {GIVE} to",
    "{0} went to the {PLACE}, and because {1} was there too, {GIVE} to", "{0} talked about {1} and {GIVE} to",
)  # fmt: skip


def mentions(names: Sequence[str], generator: random.Random) -> list[str]:
    """Return the mentions before the giver's last one: names[0] once, the others, names[1] the giver, once or more.

    With the giver's last mention every name but names[0] is there at least twice.
    """
    order = [names[0], names[1]]
    for other in names[2:]:
        order += [other] * (3 if generator.random() < 0.15 else 2)
    if generator.random() < 0.1:
        order.append(names[1])
    generator.shuffle(order)
    return order


def story(names: Sequence[str], receiver_is_late: bool, generator: random.Random) -> str:
    """Return a story up to "to" with slots {PLACE} and {OBJECT}; names[0] receives, names[1] gives."""
    order = mentions(names, generator)
    if receiver_is_late:
        order.remove(names[0])
    clauses = _clauses(order, generator)
    give = generator.choice(GIVES)
    if receiver_is_late:
        clauses.append(generator.choice(LATE).replace("{GIVE}", give).replace("{0}", names[1]).replace("{1}", names[0]))
    else:
        clauses.append(f"{names[1]} {give} to")
    return _join(clauses, generator)


def _clauses(order: Sequence[str], generator: random.Random) -> list[str]:
    """Return clauses that mention the names in this order, none twice in one clause."""
    clauses: list[str] = []
    position = 0
    while position < len(order):
        sizes = [n for n in (1, 2, 3) if position + n <= len(order) and len(set(order[position : position + n])) == n]
        size = generator.choice(sizes if len(sizes) == 1 else sizes[1:])
        clause = generator.choice((ONE, TWO, THREE)[size - 1])
        for number, name in enumerate(order[position : position + size]):
            clause = clause.replace(f"{{{number}}}", name)
        clauses.append(clause)
        position += size
    return clauses


def _join(clauses: Sequence[str], generator: random.Random) -> str:
    """Return the clauses as one text."""
    if len(clauses) > 1 and generator.random() < 0.4:
        text = generator.choice(SUBORDINATES) + clauses[0] + ", " + clauses[1]
        rest = clauses[2:]
    else:
        text = generator.choice(OPENERS) + clauses[0]
        rest = clauses[1:]
    for clause in rest:
        text += generator.choice(JOINTS) + clause
    return text[0].upper() + text[1:]
