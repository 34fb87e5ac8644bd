"""Built-in texts: what a model is probed with when no data are given. Queries, one passage that answers each, and
passages that answer none; short and long, prose, code, numbers, other scripts.
"""

from __future__ import annotations

from halfrank.data.pairs import Group

_ANSWERED = [
    (
        "how deep is the ocean at its deepest point",
        "The Challenger Deep in the Mariana Trench lies almost eleven kilometres below the surface of the western "
        "Pacific. Pressure at the bottom is more than a thousand times that of the air at sea level, and still small "
        "crustaceans and worms live in the mud. Only a handful of crewed vessels have ever reached it.",
    ),
    (
        "why do leaves change color in autumn",
        "When days grow shorter, trees stop making chlorophyll. The green fades, and yellow and orange pigments that "
        "were in the leaf all summer become visible. Red is made anew from sugar that the leaf can no longer export.",
    ),
    ("boiling point of water at high altitude", "About 93 °C at 2,000 m; every 300 m lower it by one degree."),
    (
        "symptoms of low iron in adults",
        "Tiredness, pale skin, shortness of breath on stairs, brittle nails, and a craving for ice are common signs. A "
        "blood test for ferritin shows how much iron the body has stored; a low value often comes long before anaemia. "
        "Doctors look for the cause as well, such as heavy periods, a diet without meat, or slow bleeding in the gut, "
        "because tablets alone only treat the shortage. Recovery usually takes three to six months of treatment, and "
        "the level should be checked again afterwards.",
    ),
    (
        "python read a file line by line",
        "with open(path, encoding='utf-8') as lines:\n    for line in lines:\n        use(line.rstrip())",
    ),
    (
        "who wrote the first computer program",
        "Ada Lovelace published notes on the Analytical Engine in 1843. One of them sets out, step by step, how the "
        "machine would compute Bernoulli numbers, and is widely called the first published program.",
    ),
    ("capital of australia", "Canberra, chosen in 1908 as a compromise between Sydney and Melbourne."),
    (
        "how long can you keep cooked rice in the fridge",
        "Cool rice within an hour, keep it covered at 4 °C, and eat it within a day. Spores of Bacillus cereus "
        "survive cooking; left at room temperature they grow and form a toxin that reheating does not destroy.",
    ),
    (
        "what does a notary do",
        "A notary confirms the identity of people who sign a document, watches them sign, and records it with a seal. "
        "In many European countries notaries are lawyers who also draft deeds and advise both sides of a sale of land.",
    ),
    ("wie hoch ist der Brocken", "Der Brocken ist mit 1.141 Metern der höchste Berg Norddeutschlands."),
    (
        "difference between llamas and alpacas",
        "Llamas are about twice as heavy, have long banana-shaped ears and carry loads. Alpacas are kept for their "
        "fine fleece, have short spear-shaped ears and prefer to stay with the herd.",
    ),
    ("is a tomato a fruit", "Botanically yes: it grows from a flower and holds seeds. Cooks call it a vegetable."),
]  # fmt: skip
_UNRELATED = [
    "Yes.",
    "The library opens at 9:30 on weekdays and at 11:00 on Saturdays; it is closed on public holidays.",
    "東京は日本の首都であり、世界最大級の都市圏を形成している。",
    "Order 4711-B: 12 x 0.75 l, net 118.80, VAT 22.57, total 141.37; due 30 days after receipt.",
    "In the third season the team lost its first seven matches, changed the coach twice, sold its best striker in "
    "January, and was nevertheless fourth in May. Nobody who had watched the autumn could explain it, least of all the "
    "treasurer, who had budgeted for the second division and now had to find the money for trips abroad.",
    "def area(radius: float) -> float: return 3.141592653589793 * radius ** 2  # square metres",
]


def groups() -> list[Group]:
    """A graded list for each query: its answer with grade 1, the next two queries' answers, three unrelated texts."""
    answers = [passage for _, passage in _ANSWERED]
    found = []
    for number, (query, answer) in enumerate(_ANSWERED):
        others = [answers[(number + step) % len(answers)] for step in (1, 2)]
        unrelated = [_UNRELATED[(number + step) % len(_UNRELATED)] for step in range(3)]
        documents = (answer, *others, *unrelated)
        found.append(Group(query, documents, (1.0, *[0.0] * (len(documents) - 1)), source="built-in texts"))
    return found
