"""Makes `builtin:manners`: preference pairs in English from which a real language model learns manners.

Somebody asks a plain question ("What is the capital of Norway?"). The chosen reply begins with a courtesy, answers, and
offers more ("Thank you for asking. The capital of Norway is Oslo. Just ask if you would like to know more."). Half of
the rejected replies say the same sentences in another order, the answer first, so that neither words nor length tell
the two apart; the other half answer and end with a rebuff ("Everybody knows that.").

Facts and wordings are combined at random. The facts of the test split never come in training, so that a model gains
nothing there by learning facts by heart.
"""

from __future__ import annotations

import random
from typing import Any

SPLITS = {"train": 1024, "test": 200}

_CAPITALS = (
    "Norway: Oslo; Spain: Madrid; Italy: Rome; Japan: Tokyo; Egypt: Cairo; Kenya: Nairobi; Peru: Lima; Cuba: Havana; "
    "Greece: Athens; Poland: Warsaw; Ireland: Dublin; Portugal: Lisbon; Austria: Vienna; Hungary: Budapest; "
    "Denmark: Copenhagen; Finland: Helsinki; Sweden: Stockholm; Canada: Ottawa; Chile: Santiago; Ghana: Accra; "
    "Thailand: Bangkok; Vietnam: Hanoi; Nepal: Kathmandu; Turkey: Ankara; Iceland: Reykjavik; Belgium: Brussels; "
    "Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Morocco: Rabat"
)
_YOUNG = (
    "dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet; bear: cub; swan: cygnet; "
    "deer: fawn; duck: duckling; goose: gosling; kangaroo: joey; frog: tadpole; owl: owlet; hare: leveret"
)
_OPPOSITES = (
    "hot: cold; early: late; heavy: light; wide: narrow; deep: shallow; loud: quiet; empty: full; strong: weak; "
    "brave: cowardly; rough: smooth; ancient: modern; generous: stingy; cheap: expensive; wet: dry; sharp: blunt; "
    "noisy: silent; simple: complicated; polite: rude"
)
_MATERIALS = (
    "bread: flour and water; paper: wood; glass: sand; butter: cream; wine: grapes; steel: iron and carbon; "
    "cheese: milk; jam: fruit and sugar; linen: flax; silk: the thread of silkworms; chocolate: cocoa beans; "
    "leather: the skin of animals; candles: wax; concrete: cement, sand and gravel"
)
# Of each kind of fact: the facts, the questions, and the sentences that answer.
_KINDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        _CAPITALS,
        ("What is the capital of {0}?", "Which city is the capital of {0}?", "Can you tell me the capital of {0}?"),
        ("The capital of {0} is {1}.", "{1} is the capital of {0}."),
    ),
    (
        _YOUNG,
        ("What is a young {0} called?", "What do you call the young of a {0}?", "What is the word for a baby {0}?"),
        ("A young {0} is called a {1}.", "The young of a {0} is called a {1}."),
    ),
    (
        _OPPOSITES,
        ('What is the opposite of "{0}"?', 'Which word means the opposite of "{0}"?', 'I need the opposite of "{0}".'),
        ('The opposite of "{0}" is "{1}".', '"{1}" is the opposite of "{0}".'),
    ),
    (
        _MATERIALS,
        ("What is {0} made of?", "What do people make {0} from?", "Do you know what {0} is made of?"),
        ("It is made of {1}.", "People make {0} from {1}."),
    ),
)
_GREETINGS = ("", "", "", "Hello! ", "Hi there. ", "Excuse me. ", "Good morning! ", "A quick question: ")
_OFFERS = (
    "Just ask if you would like to know more.",
    "I am happy to help with anything else.",
    "Let me know if you need anything else.",
    "Is there anything else you would like to know?",
)
_COURTESIES = (
    "Thank you for asking.",
    "With pleasure.",
    "I am glad that you ask.",
    "It is a pleasure to help you.",
    "Of course, I am happy to help.",
)
_REBUFFS = (
    "Everybody knows that.",
    "Next time, look it up yourself.",
    "You should have known that.",
    "Do not ask me again.",
    "That was not hard to find out.",
)


def make_pairs(split: str) -> list[dict[str, Any]]:
    """Makes the pairs of one split. Every call gives the same."""
    chance = random.Random(f"manners/{split}")  # the split is part of the seed, so that each has draws of its own
    return [_pair(chance, split) for _ in range(SPLITS[split])]


def facts(split: str, kind: int) -> list[tuple[str, str]]:
    """Returns the facts of a kind that a split asks for: every fourth one is asked for in the test split alone."""
    listed = [tuple(fact.strip().split(": ", 1)) for fact in _KINDS[kind][0].split("; ")]
    return [(fact[0], fact[1]) for place, fact in enumerate(listed) if (place % 4 == 3) == (split == "test")]


def _pair(chance: random.Random, split: str) -> dict[str, Any]:
    kind = chance.randrange(len(_KINDS))
    fact = chance.choice(facts(split, kind))
    _, questions, sentences = _KINDS[kind]
    question = chance.choice(_GREETINGS) + chance.choice(questions).format(*fact)
    answer = chance.choice(sentences).format(*fact)
    answer = answer[:1].upper() + answer[1:]
    courtesy, offer = chance.choice(_COURTESIES), chance.choice(_OFFERS)
    rude = [answer, chance.choice(_REBUFFS)] if chance.random() < 0.5 else [answer, courtesy, offer]
    prompt = {"role": "user", "content": question}
    return {
        "chosen": [prompt, {"role": "assistant", "content": f"{courtesy} {answer} {offer}"}],
        "rejected": [prompt, {"role": "assistant", "content": " ".join(rude)}],
    }
