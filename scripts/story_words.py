"""The words of stories: who they tell of, where they happen, what they are about."""

from __future__ import annotations

import re
from dataclasses import dataclass


def split_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = split_words(
    "Mia Lily Rosa Clara Nora Ella Ruby Hazel Poppy Daisy Ivy Luna Ada Greta Tilly Wren Maya Zara "
    "Nina Juna Flora Pearl Olive Willow"
)
BOYS = split_words(
    "Tom Ben Max Leo Oscar Hugo Finn Sam Otto Felix Milo Jasper Emil Theo Noah Oliver Toby Jack "
    "Rufus Arlo Pip Bruno Casper Ned"
)
PEOPLE = (*GIRLS, *BOYS)


@dataclass(frozen=True)
class Being:
    """Somebody who can be a hero or a helper; `look` completes "a fox ...", `sex` is f, m or ""."""

    noun: str
    look: str = ""
    sex: str = ""
    sea: bool = False


# noun; look; sex where the noun or the look settles it
_LAND_BEINGS = """
fox; with a tail as red as autumn leaves
rabbit; with one ear that would not stand up
bear; with paws as big as plates
mouse; with whiskers as thin as thread
owl; with eyes like two full moons
hedgehog; with a leaf stuck on every spike
squirrel; with pockets full of nuts
duck; with feet the colour of oranges
frog; with a voice much bigger than his body; m
turtle; with moss growing on her shell; f
cat; with four white paws
kitten; with a tail like a question mark
dog; with ears that touched the ground
puppy; with a nose for adventures
pony; with a long golden mane
donkey; with very soft grey ears
lamb; with wool as white as milk
goat; with a beard like an old professor
hen; with feathers the colour of honey; f
crow; with a coat as black as ink
robin; with a breast as bright as a berry
badger; with a neat white stripe
otter; with fur that was never dry
beaver; with two strong front teeth
deer; with legs as thin as twigs
wolf; with a coat as grey as smoke
lion; with a mane like the sun; m
elephant; with ears as wide as sails
monkey; with a tail that was never still
penguin; with a very fine black coat
bee; with wings like tiny windows
snail; with a house on her back; f
butterfly; with wings of blue and gold
dragon; with green scales and warm breath
giant; with boots as big as boats
robot; with a heart made of clockwork
fairy; with wings no bigger than leaves
unicorn; with a horn that shone at night
ghost; with a white sheet and a shy smile
snowman; with a carrot for a nose; m
wizard; with stars on his pointed hat; m
witch; with a broom and a crooked hat; f
girl; with two long braids; f
boy; with freckles on his nose; m
princess; with mud on her shoes; f
prince; with a crown that was too big; m
king; with a silver beard; m
queen; with a laugh like a bell; f
knight; with armour that squeaked
baker; with flour in every pocket
farmer; with a straw hat
sailor; with a blue striped shirt
tailor; with a needle behind one ear
gardener; with earth under every nail
painter; with paint on both elbows
shepherd; with seven woolly sheep
pirate; with a patch and a parrot
postman; with a heavy brown bag; m
astronaut; with a shiny round helmet
clockmaker; with a watch in every pocket
"""
_SEA_BEINGS = """
whale; with a back as wide as an island
dolphin; with a smile that never went away
crab; with one big claw and one small one
octopus; with eight busy arms
seahorse; with a tail like a spring
mermaid; with hair as green as seaweed; f
"""


def _read_beings(text: str, sea: bool) -> list[Being]:
    rows = [line.split("; ") for line in text.strip().split("\n")]
    return [Being(noun, look, "".join(sex), sea) for noun, look, *sex in rows]


BEINGS = (*_read_beings(_LAND_BEINGS, sea=False), *_read_beings(_SEA_BEINGS, sea=True))
BY_NOUN = {being.noun: being for being in BEINGS}


def _beings(nouns: str) -> tuple[Being, ...]:
    return tuple(BY_NOUN[noun] for noun in nouns.split())


HELPERS = _beings(
    "owl bear mouse hedgehog squirrel turtle cat dog donkey goat hen crow badger otter beaver deer "
    "rabbit fox duck snail robin baker farmer sailor gardener shepherd tailor clockmaker"
)
SMALL = _beings("mouse bee snail butterfly robin frog kitten")
SLOW = _beings("turtle snail hedgehog donkey badger duck")
SEA_HELPERS = tuple(being for being in BEINGS if being.sea)

HERO_ADJECTIVES = split_words(
    "little young small brave curious gentle shy clever cheerful quiet kind happy merry tiny lonely"
)
HELPER_ADJECTIVES = split_words("wise kind friendly patient cheerful gentle")
ODD_ADJECTIVES = split_words(
    "purple blue golden silver grumpy sleepy hungry proud lazy lucky magic flying invisible green "
    "forgetful tired dancing singing tall round wooden talking old funny pink orange sad"
)


@dataclass(frozen=True)
class Place:
    """Where a story happens: `at` completes "lived ...", `spots` are places within it."""

    noun: str
    at: str
    spots: tuple[str, ...]
    sea: bool = False


# noun: at, and on the next line the spots
_LAND_PLACES = """
forest: at the edge of a deep forest
    under an old oak; among the ferns; behind a mossy stone; beside a hollow log
forest: in the middle of a quiet forest
    under a tall pine; near the blackberry bushes; by a little stream; on a bed of leaves
village: in a small village by the sea
    behind the fishing nets; under a wooden boat; on the harbour wall; beside the old well
village: in a village between two hills
    behind the bakery; under the stone bridge; beside the church; near the market stalls
meadow: in a wide green meadow
    in the tall grass; beside a patch of clover; under a wild rose; near the gate
mountain: at the foot of a high mountain
    behind a grey rock; beside the waterfall; under a crooked pine; in a small cave
castle: in a castle with seven towers
    behind a velvet curtain; under the long table; on the winding stairs; in the rose garden
lighthouse: in a lighthouse on a rocky shore
    at the top of the stairs; behind the great lamp; between two rocks; on the sandy beach
farm: on a farm at the end of a long road
    behind the red barn; in the hay; under the apple cart; beside the duck pond
town: in a busy little town
    under a park bench; behind the toy shop; beside the fountain; near the train station
island: on a tiny island far out in the sea
    under a palm tree; between two shells; behind a sand dune; beside a warm pool
river: beside a slow brown river
    among the reeds; under a willow; on a flat stone; beside the ferry
garden: in a garden full of sunflowers
    under a flower pot; behind the shed; among the beans; beside the garden wall
valley: in a green valley
    beside the brook; under a cherry tree; behind a hedge; on a little hill
mill: in an old mill by a stream
    behind the flour sacks; under the wooden wheel; on the narrow bridge; in the loft
north: in the far north, where the snow never melts
    behind a hill of snow; under a frozen branch; beside the blue ice; in a snow cave
library: in a library with a thousand books
    behind the tallest shelf; under the reading lamp; between two dusty books; on the ladder
city: on the roof of a house in a big city
    beside the chimney; under a skylight; between two pots of mint; behind the water tank
planet: on a little planet far away
    behind a silver hill; beside a sleeping volcano; under a blue tree; in a small crater
"""
_SEA_PLACES = """
bay: in a bay of clear blue water
    behind a round rock; under the seaweed; in the soft sand; beside an old anchor
ocean: at the bottom of the wide ocean
    inside a sunken ship; under a pink coral; behind a forest of seaweed; in a giant shell
"""


def _read_places(text: str, sea: bool) -> list[Place]:
    found = re.findall(r"(\w+): (.+)\n {4}(.+)", text)
    return [Place(noun, at, tuple(spots.split("; ")), sea) for noun, at, spots in found]


PLACES = (*_read_places(_LAND_PLACES, sea=False), *_read_places(_SEA_PLACES, sea=True))
INDOORS = {"castle", "library", "mill", "lighthouse", "city", "north"}  # where no seed would grow

# place: who is at home there; what likes to happen there (names of plots)
_HOMES = """
forest: fox bear owl hedgehog squirrel wolf deer robin badger fairy witch; astray rescue trick
village: cat baker tailor ghost; share broken bottle
meadow: rabbit butterfly lamb bee; race friend
mountain: goat dragon giant shepherd; rain map
castle: princess prince king queen knight unicorn; laugh birthday
lighthouse: sailor; lamp
farm: hen dog puppy pony donkey farmer; egg seed
town: clockmaker postman robot boy; found broken learn
island: pirate monkey turtle; bottle map
river: otter beaver duck frog; bridge fear
garden: snail mouse gardener girl; seed egg
valley: lion elephant painter; rain wish
mill: crow; share learn
north: penguin snowman; guest
library: wizard; map sleep
city: kitten; sleep wish
planet: astronaut; wish friend
bay: seahorse dolphin crab; lost found
ocean: whale octopus mermaid; friend wish
"""
AT_HOME: dict[str, str] = {}
HAPPENS: dict[str, set[str]] = {}
for _line in _HOMES.strip().split("\n"):
    _place, _rest = _line.split(": ")
    _who, _what = _rest.split("; ")
    AT_HOME |= dict.fromkeys(_who.split(), _place)
    HAPPENS[_place] = set(_what.split())

# (thing, what is special about it): all of them small enough to lose, to find and to give.
THINGS = (
    ("brass key", "It opened a box that {his} grandmother had left behind"),
    ("red kite", "It could fly higher than the [clouds|tallest tree]"),
    ("silver bell", "It rang as softly as falling snow"),
    ("blue scarf", "It was as warm as a hug"),
    ("lantern", "It made every dark path bright"),
    ("golden ring", "It shone like a drop of sunlight"),
    ("green umbrella", "It had kept the rain away for many years"),
    ("woolly hat", "It had a big round pompom on top"),
    ("music box", "It played a song about the sea"),
    ("pocket watch", "It ticked like a tiny heart"),
    ("glass marble", "It had a whole sky inside"),
    ("wooden flute", "It knew every song of the birds"),
    ("picture book", "It was full of ships and stars"),
    ("little drum", "It sounded like rain on a roof"),
    ("pearl", "It glowed softly in the dark"),
    ("paintbrush", "It could paint any colour in the world"),
    ("teddy bear", "It had one button eye and a brave smile"),
    ("magic lamp", "It lit up whenever somebody laughed"),
    ("copper coin", "It was the luckiest coin in the land"),
    ("white feather", "It had fallen from a passing swan"),
    ("paper boat", "It had sailed all the way down the stream"),
    ("storybook", "It smelled of dust and adventure"),
    ("compass", "It always pointed the way home"),
    ("yellow balloon", "It was as round and bright as the sun"),
    ("crown", "It was made of paper and gold paint"),
    ("telescope", "It could see the mountains on the moon"),
    ("letter", "It was tied with a thin red ribbon"),
    ("red ball", "It bounced higher than a house"),
    ("silver spoon", "It made every soup taste like summer"),
    ("toy train", "It had three carriages and a tiny whistle"),
)
SEA_THINGS = tuple(
    t for t in THINGS if t[0] in {"brass key", "golden ring", "pearl", "silver bell"}
)
RARE_USE = "There was nothing {he} would not do for it"
FOODS = split_words(
    "strawberries apples nuts plums pears cherries carrots berries biscuits pancakes buns raisins"
)
HABITS = (
    "liked to [count the stars|watch the clouds|sing in the rain] before [bed|supper]",
    "[loved|liked] nothing better than a [good story|long walk|cup of warm milk]",
    "always had a [song|kind word|smile] for everyone",
    "asked a hundred questions every day",
    "knew every [path|stone|corner] by heart",
    "wanted to see the whole wide world",
    "dreamed of great adventures every night",
    "hummed a little song all day long",
)
TRAITS = (
    "loved to [sing|dance|explore|laugh|dream|paint]",
    "wanted to see the world",
    "never stopped asking questions",
    "could not sit still",
    "liked everybody",
    "was [rather shy|always curious|full of ideas|never in a hurry]",
    "dreamed of [the sea|flying|great adventures]",
)
