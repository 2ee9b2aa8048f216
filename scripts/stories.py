"""A story grammar: the text that the `demo` checkpoint is trained on.

Every story is drawn from a hero, a place, a plot and a cast of helpers and things. A plot is a list
of beats, a beat a choice of sentences, and one dictionary of words fills them all, so that names,
pronouns and things agree from the first sentence to the last. Everything is a pure function of the
`random.Random` it is given: the same seed makes the same text on any machine.

Templates use two marks: `[a|b|c]` is a choice (it may nest), `{word}` is filled from the story's
words. The words are in `story_words.py`, the plots in `story_plots.txt`, what users ask in
`story_wishes.py`. `python scripts/stories.py --help` prints stories to read.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from story_words import (
    AT_HOME,
    BEINGS,
    BOYS,
    BY_NOUN,
    FOODS,
    GIRLS,
    HABITS,
    HAPPENS,
    HELPER_ADJECTIVES,
    HELPERS,
    HERO_ADJECTIVES,
    INDOORS,
    PEOPLE,
    PLACES,
    RARE_USE,
    SEA_HELPERS,
    SEA_THINGS,
    SLOW,
    SMALL,
    THINGS,
    TRAITS,
    Being,
    Place,
)

# --- plots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """A plot: one alternative of each of the `beats`, in order, then one of the `ends`.

    `themes` are words that ask for this plot, `asks` longer ways to ask for it. Each group of
    `scenes` adds one of its dictionaries to the story's words. `marks` say what the plot needs:
    sea (may be told of sea creatures), thing, small or slow (helpers), outdoors, at-PLACE.
    """

    name: str
    themes: tuple[str, ...]
    asks: tuple[str, ...]
    marks: frozenset[str]
    beats: tuple[tuple[str, ...], ...]
    ends: tuple[str, ...]
    scenes: tuple[tuple[dict[str, str], ...], ...]


# One paragraph a plot. "name: themes", "? asks", "! marks", "- a beat", "| its alternative (empty:
# may be left out)", "= an end", "@ a scene", "& a scene of a second group".
_PLOTS = Path(__file__).with_name("story_plots.txt").read_text(encoding="utf-8")


def _read_plot(paragraph: str) -> Plot:
    """One paragraph of `_PLOTS` as a plot."""
    header, *lines = re.sub(r"\n {4}", " ", paragraph).split("\n")
    name, _, themes = header.partition(": ")
    rows = [(line[0], line[2:]) for line in lines]
    asks = [row.split("; ") for mark, row in rows if mark == "?"]
    marks = [row.split() for mark, row in rows if mark == "!"]
    beats: list[tuple[str, ...]] = []
    for mark, row in rows:
        if mark == "-":
            beats.append((row,))
        elif mark == "|":
            beats[-1] = (*beats[-1], row)
    scenes = [
        tuple(
            {key: value for key, _, value in (pair.partition("=") for pair in row.split("; "))}
            for mark, row in rows
            if mark == group
        )
        for group in "@&"
    ]
    return Plot(
        name,
        tuple(themes.split("; ")),
        tuple(asks[0]),
        frozenset(marks[0] if marks else ()),
        tuple(beats),
        tuple(row for mark, row in rows if mark == "="),
        tuple(group for group in scenes if group),
    )


PLOTS = tuple(_read_plot(paragraph) for paragraph in _PLOTS.strip().split("\n\n"))
PLOT = {plot.name: plot for plot in PLOTS}
BY_THEME: dict[str, tuple[Plot, ...]] = {}
for _plot in PLOTS:
    for _theme in _plot.themes:
        BY_THEME[_theme] = (*BY_THEME.get(_theme, ()), _plot)

OPENINGS = (
    "Once upon a time, there was {a_hero} named {N}. {N} lived {at}. {habit}",
    "Once upon a time, there was {a_hero} {look}. {His} name was {N}, and {he} lived {at}.",
    "Once upon a time there was {a_hero} [named|called] {N} who lived {at}. {habit}",
    "Once upon a time there lived {a_hero} {at}. {His} name was {N}. {habit}",
    "Once upon a time, {at}, there lived {a_hero} named {N}. {habit}",
    "Once upon a time there was {a_hero} who {trait}. {His} name was {N}, and {he} lived {at}.",
    "Once upon a time, in a land far away, there was {a_hero} named {N}. {N} lived {at}.",
    "Once upon a time, {a_hero} named {N} lived {at}. {habit}",
)
OTHER_OPENINGS = (
    "Long ago, {a_hero} named {N} lived {at}. {habit}",
    "Long, long ago there was {a_hero} {look}. {His} name was {N}, and {he} lived {at}.",
    "{At} lived {a_hero} named {N}. {habit}",
    "{At}, there lived {a_hero} who {trait}. {His} name was {N}.",
    "There was once {a_hero} [named|called] {N} who lived {at}. {habit}",
    "Far, far away, {a_hero} [named|called] {N} lived {at}. {habit}",
    "{N} was {a_hero} {look}. {He} lived {at}. {habit}",
    "This is the story of {N}, {a_hero} who lived {at}. {habit}",
    "Many years ago there was {a_hero} named {N}. {He} lived {at}. {habit}",
)
MORNINGS = (
    (
        "One [morning|day], {a_hero} named {N} [woke up early|looked out of the window]. "
        "{N} lived {at}."
    ),
    "One [sunny|rainy|windy] morning, {a_hero} named {N} was sitting {spot3}. {N} lived {at}.",
    "On a [sunny|rainy|quiet] day, {a_hero} named {N} went for a walk. {He} lived {at}.",
)

# --- telling --------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_VOWEL = re.compile(r"(?!uni|eu|one\b|use)(?:[aeiou]|hon|hour)", re.IGNORECASE)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a being's noun."""
    if noun in {"deer", "sheep", "moose"}:
        return noun
    if noun.endswith("mouse"):
        return f"{noun[:-5]}mice"
    if noun.endswith(("man", "wolf")):
        return f"{noun[:-3]}men" if noun.endswith("man") else f"{noun[:-1]}ves"
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def fill(rng: random.Random, template: str, words: dict[str, str]) -> str:
    """Settle the choices and fill in the words, twice, as words may hold words themselves."""
    while (choice := _CHOICE.search(template)) is not None:
        picked = rng.choice(choice.group(1).split("|"))
        template = template[: choice.start()] + picked + template[choice.end() :]
    return template.format_map(words).format_map(words)


@dataclass(frozen=True)
class Story:
    """A finished story and the words it was made of, from which a request for it can be made.

    `start` is how the text begins: who, where, and the first beat of the plot.
    """

    text: str
    start: str
    plot: Plot
    place: Place
    words: dict[str, str]


@dataclass(frozen=True)
class Topic:
    """What a story shall be about; whatever is None is drawn at random."""

    hero: Being | None = None
    adjective: str | None = None
    name: str | None = None
    plot: Plot | None = None
    place: Place | None = None
    thing: tuple[str, str] | None = None


def topic(rng: random.Random, about: str) -> Topic:
    """Read a topic such as "fox", "a brave fox", "a lost key", "the lighthouse" or "courage".

    A noun that the grammar does not know becomes the hero: "a story about a teapot" is a story of
    a teapot with a name, as in many a fairy tale.
    """
    about = about.strip().rstrip(".!?").lower()
    bare = re.sub(r"^(a|an|the) ", "", about)
    for words in (about, f"a {bare}", f"the {bare}", bare):
        if words in BY_THEME:
            return Topic(plot=rng.choice(BY_THEME[words]))
    *adjectives, noun = bare.split()
    things = [thing for thing in THINGS if noun == thing[0].split()[-1]]
    if things or "lost" in adjectives:
        plot = PLOT["lost"] if "lost" in adjectives else PLOT[rng.choice(("lost", "found"))]
        return Topic(plot=plot, thing=things[0] if things else (noun, RARE_USE))
    places = [place for place in PLACES if place.noun == noun]
    if places:
        return Topic(place=rng.choice(places))
    hero = BY_NOUN.get(noun, Being(noun))
    return Topic(hero=hero, adjective=" ".join(adjectives) or None)


def _may_happen(plot: Plot, about: Topic, sea: bool) -> bool:
    """Whether the plot suits the hero's element, the wanted thing and the wanted place."""
    here = about.place.noun if about.place else None
    at = next((mark[3:] for mark in plot.marks if mark.startswith("at-")), None)
    return (
        ("sea" in plot.marks or not sea)
        and ("thing" in plot.marks or about.thing is None)
        and (here is None or at in (None, here))
        and (here not in INDOORS or "outdoors" not in plot.marks)
    )


def _scenes(rng: random.Random, plot: Plot, hero: Being) -> dict[str, str]:
    """One scene of each group, but none in which the hero's own kind is the wolf or the queen."""
    drawn: dict[str, str] = {}
    for group in plot.scenes:
        drawn |= rng.choice([scene for scene in group if hero.noun not in scene.values()])
    return drawn


def tell(rng: random.Random, about: Topic | str | None = None) -> Story:
    """Tell one story of 60 to 190 tokens; `about` fixes what the caller cares for."""
    if about is None:
        about = Topic()
    elif isinstance(about, str):
        about = topic(rng, about)
    hero = about.hero
    if hero is None:
        seas = {True, False}
        if about.place is not None:
            seas = {about.place.sea}
        elif about.plot is not None and "sea" not in about.plot.marks:
            seas = {False}
        hero = rng.choice([being for being in BEINGS if being.sea in seas])
    sea = about.place.sea if about.place is not None else hero.sea
    # Half of all heroes are where one would look for them, and much happens where it would.
    places = [place for place in PLACES if place.sea == sea]
    if about.plot is not None:
        places = [place for place in places if _may_happen(about.plot, Topic(place=place), sea)]
    at_home = [place for place in places if place.noun == AT_HOME.get(hero.noun)]
    place = about.place or rng.choice(at_home if at_home and rng.random() < 0.5 else places)
    plots = [plot for plot in PLOTS if _may_happen(plot, replace(about, place=place), sea)]
    likely = [plot for plot in plots if plot.name in HAPPENS[place.noun]]
    plot = about.plot or rng.choice(likely if likely and rng.random() < 0.4 else plots)
    thing, use = about.thing or rng.choice(SEA_THINGS if sea else THINGS)

    # The hero is never of the helper's kind, so that "the fox" means one of them only.
    cast = SEA_HELPERS if sea else HELPERS
    if "small" in plot.marks or "slow" in plot.marks:
        cast = SMALL if "small" in plot.marks else SLOW
    helper, other = rng.sample([being for being in cast if being.noun != hero.noun], 2)
    helper_adjective = rng.choice(HELPER_ADJECTIVES)
    if rng.random() < 0.4:
        helper_adjective += " little" if "small" in plot.marks else " old"

    female = (hero.sex or rng.choice("fm")) == "f"
    if about.name in GIRLS or about.name in BOYS:
        female = about.name in GIRLS
    names = GIRLS if female else BOYS
    alike = [name for name in names if name[0].lower() == hero.noun[0]]
    name = about.name or rng.choice(alike if alike and rng.random() < 0.4 else names)
    friend = rng.choice([n for n in PEOPLE if n != name])
    trait = fill(rng, rng.choice(TRAITS), {})
    adjective = about.adjective
    if adjective is None:
        adjective = rng.choice(HERO_ADJECTIVES) if rng.random() < 0.85 else ""
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    spots = rng.sample(place.spots, 3)
    words = {
        "N": name,
        "F": friend,
        "hero": hero.noun,
        "heroes": plural(hero.noun),
        "a_hero": article(f"{adjective} {hero.noun}".strip()),
        "look": hero.look or f"who {trait}",
        "trait": trait,
        "he": he,
        "him": him,
        "his": his,
        "hers": "hers" if female else "his",
        "He": he.capitalize(),
        "His": his.capitalize(),
        "at": place.at,
        "At": place.at[0].upper() + place.at[1:],
        "place": place.noun,
        "spot": spots[0],
        "spot2": spots[1],
        "spot3": spots[2],
        "thing": thing,
        "a_thing": article(thing),
        "use": use,
        "food": rng.choice(FOODS),
        "H": helper.noun,
        "a_helper": article(f"{helper_adjective} {helper.noun}"),
        "a_plain_helper": article(helper.noun),
        "other": other.noun,
        "habit": f"{{He}} {rng.choice(HABITS)}." if rng.random() < 0.35 else "",
    } | _scenes(rng, plot, hero)
    words = {key: fill(rng, value, words) for key, value in words.items()}

    draw = rng.random()
    opening = rng.choice(OPENINGS if draw < 0.7 else OTHER_OPENINGS if draw < 0.93 else MORNINGS)
    beats = [rng.choice(beat) for beat in plot.beats]
    if opening in MORNINGS:  # "One morning, a fox woke up. That day the fox ...", not "One day"
        beats[0] = re.sub(
            r"^One (\w+ ){0,2}?(morning|day|afternoon|evening|night)\b", r"That \2", beats[0]
        )
    lines = [opening, *beats, rng.choice(plot.ends)]
    parts = [fill(rng, line, words).strip() for line in lines]
    return Story(" ".join(filter(None, parts)), " ".join(parts[:2]), plot, place, words)


def main() -> None:
    """Print stories to read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="the seed (default 0)")
    parser.add_argument("--about", help='a topic, such as "a brave fox" or "a lost key"')
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.n):
        print(tell(rng, options.about).text + "\n")


if __name__ == "__main__":
    main()
