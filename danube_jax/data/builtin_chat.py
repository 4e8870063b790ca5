"""Small conversations and preferences that need no file: facts about things and animals.

Every fact is asked for in several ways and answered in one of two manners, in a word or in a whole
sentence. A model tuned on the conversations answers in either manner; the preferences ask for the
sentence, so that what they do to a model can be seen in a transcript. Both are always the same.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from danube_jax.data.conversations import Conversation
from danube_jax.data.permutation import draw
from danube_jax.data.preferences import PreferencePair

_COLOURS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a lemon": "yellow",
    "the sky": "blue",
    "a cherry": "red",
    "a carrot": "orange",
    "milk": "white",
    "a banana": "yellow",
    "a leaf": "green",
    "the sea": "blue",
    "a tomato": "red",
    "chocolate": "brown",
    "a raven": "black",
    "a flamingo": "pink",
    "an elephant": "grey",
}
_SOUNDS = {
    "a dog": "bark",
    "a cat": "meow",
    "a cow": "moo",
    "a duck": "quack",
    "a lion": "roar",
    "a sheep": "bleat",
    "a frog": "croak",
    "a bee": "buzz",
    "a snake": "hiss",
    "a wolf": "howl",
    "an owl": "hoot",
    "a mouse": "squeak",
}
_HOMES = {
    "a fish": "water",
    "a bird": "a nest",
    "a bear": "a cave",
    "a bee": "a hive",
    "a camel": "the desert",
    "a monkey": "the jungle",
    "a penguin": "the ice",
    "a spider": "a web",
    "a horse": "a stable",
    "an ant": "a hill",
    "a whale": "the sea",
    "a mole": "a tunnel",
}
_OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "day": "night",
    "up": "down",
    "open": "closed",
    "early": "late",
    "full": "empty",
    "fast": "slow",
    "old": "new",
    "wet": "dry",
    "light": "dark",
    "first": "last",
    "true": "false",
    "long": "short",
}
_CAPITALS = {
    "France": "Paris",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Serbia": "Belgrade",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Egypt": "Cairo",
}

# Facts; ways to ask for one; the sentence that answers.
_KINDS: tuple[tuple[Mapping[str, str], tuple[str, ...], str], ...] = (
    (
        _COLOURS,
        ("What colour is {0}?", "Which colour does {0} have?", "Tell me the colour of {0}."),
        "The colour of {0} is {1}.",
    ),
    (
        _SOUNDS,
        ("What sound does {0} make?", "What do you hear from {0}?", "Name the sound of {0}."),
        "The sound of {0} is a {1}.",
    ),
    (
        _HOMES,
        ("Where does {0} live?", "What is the home of {0}?", "Tell me where {0} lives."),
        "The home of {0} is {1}.",
    ),
    (
        _OPPOSITES,
        ("What is the opposite of {0}?", "Which word is the contrary of {0}?"),
        "The opposite of {0} is {1}.",
    ),
    (
        _CAPITALS,
        ("What is the capital of {0}?", "Which city is the capital of {0}?"),
        "The capital of {0} is {1}.",
    ),
)
_OPENINGS = ("", "Please: ", "A question: ", "Hello! ", "I wonder: ", "Help me: ")
_SEED = 20


def _questions() -> Iterator[tuple[str, str, str]]:
    """(question, answer in a word, answer in a sentence), in a mixed order."""
    everything = [
        (
            opening + question.format(thing),
            f"{fact[0].upper()}{fact[1:]}.",
            sentence.format(thing, fact),
        )
        for facts, questions, sentence in _KINDS
        for (thing, fact), question in itertools.product(facts.items(), questions)
        for opening in _OPENINGS
    ]
    return iter(sorted(everything, key=lambda one: draw(2**62, _SEED, one[0])))


def conversations() -> list[Conversation]:
    """Conversations of one to three questions, each answered in a word or in a sentence."""
    found, waiting = [], list(_questions())
    while waiting:
        turns = 1 + draw(3, _SEED, "turns", len(waiting))
        messages: list[Mapping[str, str]] = []
        for question, word, sentence in waiting[:turns]:
            manner = draw(2, _SEED, "manner", question)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": sentence if manner else word})
        found.append(tuple(messages))
        waiting = waiting[turns:]
    return found


def preferences() -> list[PreferencePair]:
    """For every question, the sentence goes before the word."""
    return [
        PreferencePair(({"role": "user", "content": question},), sentence, word)
        for question, word, sentence in _questions()
    ]


SOURCES: Mapping[str, Callable[[], list[Any]]] = {
    "chat": conversations,
    "preferences": preferences,
}
