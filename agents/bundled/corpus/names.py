"""Names, numbers, dates and words that the documents are made of.

Names are built from syllables over the whole alphabet, so that the model cannot learn them by heart and must
copy them. One name in ten (by a checksum of its text) is held out: training never shows it, the skill table
uses no other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

ONSETS = (
    "b c d f g h j k l m n p r s t v w z " * 4
    + "b d f g k l m n r s t v z " * 3
    + "qu x y br ch cr dr fl gr kr pl pr sh sk st th tr vr"
).split()
VOWELS = ("a e i o u " * 7 + "a e o a y ai au ea ei ie io oa ou ue").split()
CODAS = ("n l r s n l r n r m d t k x b g p v z th sh nd rn st ck ng ll rt ss").split()

PERSON_ATTRIBUTES = (
    "mentor owner manager teacher captain author founder partner neighbour rival spouse assistant "
    "editor keeper director agent doctor cousin guide sponsor pilot designer leader boss friend "
    "parent sibling colleague supervisor"
).split()
PLACE_ATTRIBUTES = (
    "city birthplace home office origin harbour destination country region village base location "
    "residence hometown capital station district headquarters"
).split()
NUMBER_ATTRIBUTES = (
    "age price weight height salary population length score budget distance area capacity balance "
    "rating quantity stock cost income members points depth speed number total count value"
).split()
DATE_ATTRIBUTES = "birthday date founded deadline hired expiry opened year start end".split()
WORD_ATTRIBUTES = "colour status language material profession category species type currency team".split()
WORDS = (
    "red blue green black white yellow open closed active ready late gold silver iron wood glass stone "
    "paper baker farmer painter sailor lawyer nurse writer singer soldier merchant music science law "
    "art trade north south east west cat dog horse bird fish wolf bear fox apple bread milk salt tea "
    "coffee wine oil book lamp chair table door window clock phone car boat train river lake hill "
    "forest road bridge market school tower garden castle morning evening winter summer spring autumn "
    "small large fast slow new old first last "
).split()
PLACE_PREFIXES = ("Port", "New", "Mount", "Lake", "Fort", "Upper", "San", "East", "Old")
KINDS = (
    "person ship company project museum bridge library team garden train lake castle school hospital farm "
    "tower machine robot planet shop hotel club bank island"
).split()
VERBS = "get fetch find read query check show retrieve request ask open list access load inspect".split()
NOUNS = "record field entry item data info value detail fact profile row page card file".split() + KINDS
COMPOSITES = (
    "home city",
    "birth year",
    "start date",
    "unit price",
    "total cost",
    "full name",
    "postal code",
    "best friend",
    "last visit",
    "net weight",
    "phone number",
    "job title",
)


@dataclass(frozen=True)
class Names:
    """Draws names, values and words from a generator."""

    rng: np.random.Generator
    """Every draw comes from here."""
    held_out: bool = False
    """Draw only names that training never shows (otherwise: only those it may show)."""

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high)."""
        return low + int(self.rng.random() * (high - low))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """k different positions of `items`, in random order."""
        return [items[i] for i in self.rng.permutation(len(items))[:k]]

    def many(self, draw: Callable[[], T], k: int) -> list[T]:
        """k different results of `draw`, in the order drawn."""
        seen: dict[T, None] = {}
        while len(seen) < k:
            seen[draw()] = None
        return list(seen)

    def _syllable(self, closed: float) -> str:
        return self.pick(ONSETS) + self.pick(VOWELS) + (self.pick(CODAS) if self.chance(closed) else "")

    def name(self) -> str:
        """One capitalised invented word of 1 to 4 syllables, e.g. Zanvel, Toruna."""
        while True:
            roll = self.rng.random()
            count = 1 if roll < 0.08 else 2 if roll < 0.6 else 3 if roll < 0.93 else 4
            text = self.pick(VOWELS)[:1] if self.chance(0.12) else ""
            text += "".join(self._syllable(0.35) for _ in range(count))
            if 3 <= len(text) <= 12 and is_held_out(text) == self.held_out:
                return text.capitalize()

    def person(self) -> str:
        return f"{self.name()} {self.name()}" if self.chance(0.15) else self.name()

    def place(self) -> str:
        if self.chance(0.12):
            return f"{self.pick(PLACE_PREFIXES)} {self.name()}"
        return self.name()

    def thing(self) -> str:
        """A name of a thing: Zanvel Bridge, the code QX-417, or one invented word."""
        roll = self.rng.random()
        if roll < 0.1:
            return f"{self.name()} {self.pick(KINDS).capitalize()}"
        return self.code() if roll < 0.2 else self.name()

    def code(self) -> str:
        letters = "".join(self.pick("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(self.integer(1, 4)))
        return f"{letters}{self.pick(('-', '', '-', '_'))}{self.digits(self.integer(1, 5))}"

    def digits(self, k: int) -> str:
        return "".join(self.pick("0123456789") for _ in range(k))

    def whole(self) -> str:
        """A whole number of 1 to 5 digits, mostly 2 to 4."""
        return str(
            self.integer(
                *self.pick(((1, 10), (10, 100), (10, 100), (100, 1000), (100, 1000), (1000, 10000), (10000, 100000)))
            )
        )

    def number(self) -> str:
        """A whole number, sometimes with a decimal part or a thousands comma."""
        roll = self.rng.random()
        if roll < 0.12:
            return f"{self.integer(1, 1000)}.{self.integer(1, 100)}"
        return f"{self.integer(1000, 100000):,}" if roll < 0.2 else self.whole()

    def year(self) -> str:
        return str(self.integer(1400, 2060))

    def date(self) -> str:
        return f"{self.year()}-{self.integer(1, 13):02d}-{self.integer(1, 29):02d}"

    def word(self) -> str:
        """A lower-case word; one in five is invented."""
        return self.name().lower() if self.chance(0.2) else self.pick(WORDS)

    def anything(self) -> str:
        """A value of any kind; names weigh most."""
        return self.pick(
            (
                self.name,
                self.name,
                self.name,
                self.person,
                self.place,
                self.thing,
                self.number,
                self.whole,
                self.date,
                self.year,
                self.word,
                self.code,
            )
        )()

    def relation(self) -> str:
        """An attribute word of any kind; one in seven is no usual one."""
        if self.chance(0.15):
            return self.word()
        words = (PERSON_ATTRIBUTES, PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, NUMBER_ATTRIBUTES)
        return self.pick(self.pick(words))

    def attribute(self) -> tuple[str, Callable[[], str]]:
        """(attribute word, draw of its values)."""
        if self.chance(0.1):
            return self.word(), self.anything
        words, draw = self.pick(self._attributes())
        return self.pick(words), draw

    def _attributes(self) -> tuple[tuple[Sequence[str], Callable[[], str]], ...]:
        return (
            (PERSON_ATTRIBUTES, self.person),
            (PERSON_ATTRIBUTES, self.person),
            (PLACE_ATTRIBUTES, self.place),
            (PLACE_ATTRIBUTES, self.place),
            (NUMBER_ATTRIBUTES, self.number),
            (NUMBER_ATTRIBUTES, self.number),
            (NUMBER_ATTRIBUTES, self.whole),
            (DATE_ATTRIBUTES, self.date if self.chance(0.5) else self.year),
            (WORD_ATTRIBUTES, self.word),
            (COMPOSITES, self.anything),
        )

    def verb_name(self) -> str:
        """An identifier as tools have them: fetch_price, get, findOwner, read_field."""
        verb, noun = self.pick(VERBS), self.pick(NOUNS)
        roll = self.rng.random()
        if roll < 0.2:
            return verb if roll < 0.1 else noun
        if roll < 0.8:
            return f"{verb}_{noun}"
        return f"{verb}{noun.capitalize()}" if roll < 0.9 else f"{noun}_{verb}"


def is_held_out(name: str) -> bool:
    """Whether `name` belongs to the tenth of all names that training never shows."""
    return zlib.crc32(name.lower().encode()) % 10 == 0


def vocabulary() -> list[str]:
    """The real words that documents are made of."""
    lists = (
        PERSON_ATTRIBUTES,
        PLACE_ATTRIBUTES,
        NUMBER_ATTRIBUTES,
        DATE_ATTRIBUTES,
        WORD_ATTRIBUTES,
        WORDS,
        KINDS,
    )
    return sorted({word for words in lists for word in words})
