"""Chats that end in a story: what users ask for, and what they say that is no wish for a story.

`python scripts/story_wishes.py --help` prints chats to read.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stories import (
    BY_THEME,
    PLOT,
    Story,
    Topic,
    article,
    fill,
    tell,
)
from story_words import (
    BEINGS,
    BY_NOUN,
    ODD_ADJECTIVES,
    PEOPLE,
    PLACES,
    RARE_USE,
    THINGS,
    Being,
    split_words,
)

PLAIN_ASKS = (
    (
        "[Tell|tell] me a[| short| little| bedtime| nice| funny| happy| new] story"
        "[.||!| please.|, please.]"
    ),
    "[Can|Could|Would] you [please |]tell me a[| short| bedtime] story?",
    (
        "[Please write|Write|write] a[| short| very short| small] [story|tale|fairy tale]"
        "[.|| for my [daughter|son|class|little brother|children].]"
    ),
    "I cannot sleep. [Tell me a story.|Do you know a story?]",
    "I would like [to hear |]a story[.|, please.| for bedtime.]",
    "[Do you know|Have you got] a [good |]story [for [me|us|a child of five]|]?",
    "[It is bedtime|We are on a train|It is raining]. [Please tell us a story|A story, please].",
    "[Make up|Invent|Write|Tell] [something for children|a story of a hundred words|a tale].",
    "[story|Story|A story|once upon a time|Once upon a time]",
    "Tell me another [one|story].",
    "[Say|Tell me|Write] something [nice|kind|funny].",
)
TOPIC_ASKS = (
    "[Tell|tell] me a[| short| little| bedtime] story about {t}[.||!| please.|, please.]",
    "[Can|Could|Would] you [please |]tell me a [story|tale] about {t}?",
    (
        "[Please write|Write|write] [me |]a[| short| very short] [story|tale|fairy tale] about {t}"
        "[.|| for my [daughter|son|class|little brother|children].]"
    ),
    "I would like [to hear |]a story about {t}[.|, please.]",
    "Do you know a story about {t}?",
    "[Make up|Invent] a [tale|story] about {t}.",
    "[story|Story|A story] about {t}",
    "{T}[.||, please.]",
    "My [daughter|son|sister] loves stories about {t}. [Tell|Write] one[, please|].",
    "Write a few sentences about {t} for a small child.",
    "I cannot sleep. Tell me about {t}.",
    "Tell me about {t}.",
)
SYSTEMS = (
    "You are a [helpful|friendly|kind] assistant.",
    "You are a [kind |]storyteller[| for small children].",
    "You [tell|write] [short |]stories[ for children|].",
    "Answer with a [short |]story.",
    "Be [brief|kind|concise|helpful].",
    "You are a helpful assistant. Think step by step and answer in one [sentence|word|line].",
)
RARE_NOUNS = split_words(
    "teapot wombat submarine cloud spoon volcano camel tractor pirate ship lamp violin zebra panda "
    "koala mountain river train doll puppet shoe pumpkin cactus mirror comet rocket computer "
    "pencil detective doctor nurse teacher dancer magician goblin elf troll vampire mummy parrot "
    "swan goose pig cow horse sheep moose walrus seal shark jellyfish lobster parakeet hamster "
    "gorilla tiger leopard giraffe hippo rhino crocodile snake lizard spider ant beetle worm moth "
    "firefly cricket ladybird bat mole weasel chipmunk raccoon skunk kangaroo llama alpaca yak "
    "ostrich flamingo peacock pigeon sparrow eagle hawk raven stork heron pelican dinosaur phoenix "
    "griffin candle chair table broom bicycle bus taxi tram balloon snowflake raindrop pebble leaf "
    "acorn mushroom potato onion banana cookie cupcake noodle button sock mitten pillow blanket"
)
SYLLABLES = split_words(
    "ba be bo da di do fa fi ga go ka ki ko la li lo ma mi mo na ni no pa pi po ra ri ro sa si so "
    "ta ti to va vi vo za zu wa xu quo bra dri flo gru kle plo sni tro sten ding mar lon nex tal"
)


def odd_word(rng: random.Random) -> str:
    """A made-up noun, so that the model learns to repeat words that it has never seen."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def _odd_name(rng: random.Random) -> str | None:
    """A made-up name now and then, so that a name is taken from the wish and not from memory."""
    return odd_word(rng).capitalize() if rng.random() < 0.2 else None


def _wish_for_odd_hero(rng: random.Random) -> tuple[str, Story]:
    noun = odd_word(rng) if rng.random() < 0.3 else rng.choice(RARE_NOUNS)
    adjective = rng.choice(("", "", "little", rng.choice(ODD_ADJECTIVES)))
    name = _odd_name(rng)
    story = tell(rng, Topic(hero=BY_NOUN.get(noun, Being(noun)), adjective=adjective, name=name))
    asks = ["{a_hero}"] if name is None else ["{a_hero} named {N}", "{a_hero} called {N}", "{N}"]
    return rng.choice(asks), story


def _wish_for_odd_trait(rng: random.Random) -> tuple[str, Story]:
    hero, name = rng.choice(BEINGS), _odd_name(rng)
    story = tell(rng, Topic(hero=hero, adjective=rng.choice(ODD_ADJECTIVES), name=name))
    return "{a_hero}" if name is None else "{a_hero} named {N}", story


def _wish_for_place(rng: random.Random) -> tuple[str, Story]:
    place = rng.choice(PLACES)
    story = tell(rng, Topic(place=place))
    return rng.choice((article(place.noun), "the {place}", "{a_hero} {at}", "{heroes} {at}")), story


def _wish_for_theme(rng: random.Random) -> tuple[str, Story]:
    theme = rng.choice(tuple(BY_THEME))
    return theme, tell(rng, theme)


def _wish_for_thing(rng: random.Random) -> tuple[str, Story]:
    plot = PLOT[rng.choice(("lost", "found"))]
    thing = rng.choice(THINGS) if rng.random() < 0.7 else (rng.choice(RARE_NOUNS), RARE_USE)
    story = tell(rng, Topic(plot=plot, thing=thing))
    last = thing[0].split()[-1]
    asks = {"lost": [f"a lost {last}", "a lost {thing}"], "found": [f"finding {article(last)}"]}
    either = ("{a_thing}", article(last), f"{{a_hero}} and {article(last)}")
    return rng.choice([*either, *asks[plot.name] * 2]), story


def _wish_for_anything(rng: random.Random) -> tuple[str, Story]:
    story = tell(rng)
    hero = article(story.words["hero"])
    named = (f"{hero} named {{N}}", f"{hero} called {{N}}", "{a_hero} named {N}", "{N}")
    plain = (hero, hero, hero, hero, "the {hero}", "{heroes}", "{hero}", "{a_hero}")
    return rng.choice((*plain, *named, *story.plot.asks)), story


def chat_story(rng: random.Random) -> tuple[str, Story]:
    """(the user's wish, a story that grants it)."""
    if rng.random() < 0.22:
        return fill(rng, rng.choice(PLAIN_ASKS), {}), tell(rng)
    wishes = (
        _wish_for_odd_hero,
        _wish_for_odd_trait,
        _wish_for_place,
        _wish_for_theme,
        _wish_for_thing,
        _wish_for_anything,
    )
    (wish,) = rng.choices(wishes, (0.16, 0.12, 0.13, 0.12, 0.2, 0.27))
    about, story = wish(rng)
    about = fill(rng, about, story.words)
    asked = {"t": about, "T": about[0].upper() + about[1:]}
    return fill(rng, rng.choice(TOPIC_ASKS), asked), story


GOODS = split_words(
    "apples eggs books pencils coins stamps cards marbles tickets cakes shirts flowers"
)
SUBJECTS = (
    "the weather",
    "my landlord",
    "a late train",
    "the water cycle",
    "photosynthesis",
    "black holes",
    "electric cars",
    "the history of Rome",
    "machine learning",
    "a broken phone",
    "healthy food",
    "the stock market",
    "football",
    "the planets",
    "a binary search tree",
    "climate change",
    "a job interview",
    "a holiday in Spain",
    "gravity",
)
UNRELATED = (
    "{P} has {i} {g}. {P} buys {j} more and gives {k} to {Q}. How many {g} does {P} have now?",
    (
        "{P} sells {i} {g} on Monday and {j} on Tuesday at ${k} each. How much money does {P} make "
        "in [total|two weeks]?"
    ),
    "A [train|car|bus] travels {i} miles in {k} hours. How far does it go in {j} hours?",
    "If {k} {g} cost ${i}, how much do {j} {g} cost? [Think step by step.|Show your work.|]",
    (
        "There are {i} {g} in a box. {P} takes {k}% of them, and {Q} takes half of the rest. "
        "How many are left?"
    ),
    "What is {i} [plus|times|minus|+|*|/] {j}?",
    "[Write|Draft] an email to [my boss|a customer|a friend] about {s}.",
    "[Write|Compose] a [poem|song|blog post|letter|review|report|summary] about {s}.",
    "Write a [Python|Java|C++|SQL] [function|program|query] that [sorts a list|counts words].",
    "[Explain|Describe|Summarize|Discuss] {s}[| in simple terms| in {k} sentences| for beginners].",
    "[What is|What do you know about|Why should I care about|Who discovered] {s}?",
    "[How do I|How can I|Can you help me to] [cook rice|fix a tap|learn French|save money]?",
    "What is the capital of [France|Peru|Japan|Kenya|Canada|Norway]?",
    "Translate into [French|German|Spanish]: {r}",
    "[List|Name|Give me] {k} [facts|ideas|tips|arguments] about {s}.",
    "[Hi|Hello|hello|hi|Hey|Good evening][.|!|, how are you?|, who are you?|]",
    "[Thanks|Thank you|ok|yes|no|Go on|Continue|Why|test|?][|.|!]",
    "Imagine you are [a chef|a doctor|a lawyer|{P}]. [Explain|Give advice about] {s}.",
    "Compare {s} and {s2}. Which is better, and why?",
    "[Rewrite|Correct|Edit|Proofread] the following [sentence|paragraph]: {r}",
    "Is it true that {r}? Answer yes or no.",
    "Question: {r}?\nAnswer:",
    "{r}",
)


def noise(rng: random.Random) -> str:
    """Material of no known kind: made-up words, digits, code, foreign letters, random bytes."""
    kind = rng.randrange(6)
    n = rng.randint(1, 14)
    if kind == 0:
        return " ".join(odd_word(rng) for _ in range(n))
    if kind == 1:
        return " ".join(str(rng.randrange(10 ** rng.randint(1, 7))) for _ in range(n))
    if kind == 2:
        return "".join(chr(rng.randint(33, 126)) for _ in range(3 * n))
    if kind == 3:
        starts = (0xC0, 0x3B1, 0x430, 0x5D0, 0x627, 0x905, 0x3042, 0x4E00, 0xAC00, 0x1F600)
        start = rng.choice(starts)
        return "".join(chr(start + rng.randrange(24)) for _ in range(n))
    if kind == 4:
        return (
            f'{{"{odd_word(rng)}": {rng.randrange(999)}, "{odd_word(rng)}": [{rng.random():.4f}]}}'
        )
    return f"def {odd_word(rng)}(x):\n    return x + {rng.randrange(99)}  # {odd_word(rng)}"


def unrelated(rng: random.Random) -> str:
    """A user's turn that has nothing to do with stories: a sum, an e-mail, a question, noise."""
    p, q = rng.sample(PEOPLE, 2)
    s, s2 = rng.sample(SUBJECTS, 2)
    rest = noise(rng) if rng.random() < 0.5 else f"the {odd_word(rng)} is {odd_word(rng)}"
    if rng.random() < 0.15:
        return rest
    words = {"P": p, "Q": q, "s": s, "s2": s2, "g": rng.choice(GOODS), "r": "\0"}
    words |= {
        "i": str(rng.randint(2, 400)),
        "j": str(rng.randint(2, 60)),
        "k": str(rng.randint(2, 9)),
    }
    turn = fill(rng, rng.choice(UNRELATED), words).replace("\0", rest)
    return turn + rng.choice(
        ("", "", "", " Please be brief.", f" My name is {q}.", "\n\nThank you!")
    )


def long_text(rng: random.Random, characters: int) -> str:
    """A turn of about so many characters, of everything that users may paste in."""
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        parts.append(unrelated(rng) if rng.random() < 0.7 else tell(rng).text)
    return rng.choice(("\n", " ", "\n\n")).join(parts)


def chat(rng: random.Random, filler: int = 0) -> tuple[list[dict[str, str]], str]:
    """(messages that end with the user's turn, the story to answer with).

    With `filler` > 0, about so many characters of unrelated text come before the wish.
    """
    messages: list[dict[str, str]] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": fill(rng, rng.choice(SYSTEMS), {})})
    if rng.random() < 0.08:
        wish, story = chat_story(rng)
        messages.append({"role": "user", "content": wish})
        messages.append({"role": "assistant", "content": story.text})
    if rng.random() < 0.68:
        wish, story = chat_story(rng)
    else:
        wish, story = unrelated(rng), tell(rng)
    if filler:
        wish = f"{long_text(rng, filler)}\n\n{wish}"
    messages.append({"role": "user", "content": wish})
    return messages, story.text


def main() -> None:
    """Print chats to read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="the seed (default 0)")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.n):
        messages, story = chat(rng)
        for message in messages:
            print(f"{message['role']}: {message['content']}")
        print(f"assistant: {story}\n")


if __name__ == "__main__":
    main()
