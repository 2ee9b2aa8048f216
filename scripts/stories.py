"""A story grammar: the text that the `demo` checkpoint is trained on.

Every story is drawn from a hero, a place, a plot and a cast of helpers and things. A plot is a list
of beats, a beat a choice of sentences, and one dictionary of words fills them all, so that names,
pronouns and things agree from the first sentence to the last. Everything is a pure function of the
`random.Random` it is given: the same seed makes the same text on any machine.

Templates use two marks: `[a|b|c]` is a choice (it may nest), `{word}` is filled from the story's
words. `python scripts/stories.py --help` prints stories or chats to read.
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass, replace

# --- words ---------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words(
    "Mia Lily Rosa Clara Nora Ella Ruby Hazel Poppy Daisy Ivy Luna Ada Greta Tilly Wren Maya Zara "
    "Nina Juna Flora Pearl Olive Willow"
)
BOYS = _words(
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

HERO_ADJECTIVES = _words(
    "little young small brave curious gentle shy clever cheerful quiet kind happy merry tiny lonely"
)
HELPER_ADJECTIVES = _words("wise kind friendly patient cheerful gentle")
ODD_ADJECTIVES = _words(
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
FOODS = _words(
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

# --- plots ---------------------------------------------------------------------------------------


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
_PLOTS = """
lost: helping; friendship
? a lost {thing}; {a_hero} who lost {his} {thing}; losing {a_thing}
! sea thing
- {N} had {a_thing} that {he} loved more than anything. {use}.
| {His} greatest treasure was {a_thing}. {use}.
- One [grey|busy|cold] [morning|evening], the {thing} was gone.
| But one day {he} looked for the {thing}, and it was not there.
- {N} looked {spot} and {spot2}, but {he} could not find it.
| {He} searched {spot}. {He} searched {spot2}. There was no {thing} anywhere.
- Then {a_helper} came by. "Why are you so sad?" asked the {H}. "I have lost my {thing}," said {N}.
| "What are you looking for?" asked {a_helper}. "My {thing}," said {N} with a sigh.
- "Let us look together," said the {H}.
| "Four eyes see more than two," said the {H}.
| "Do not cry," said the {H}. "I will help you."
- They looked [all afternoon|high and low], and there it was, {spot3}.
| They had not looked for long when the {H} called out. There was the {thing}, {spot3}.
= {N} thanked the {H} with all {his} heart, and from that day on they were friends.
= {N} laughed with joy, and {he} never lost the {thing} again.
= That day {N} found two things: the {thing} and a new friend.

fear: courage; bravery; being brave
? {a_hero} who is afraid of {fear}; {a_hero} who was afraid of {fear}; being brave
- {N} was not afraid of anything, except {fear}.
| There was only one thing {he} was afraid of, and that was {fear}.
- {crisis}
| Then something happened. {crisis}
- "Somebody has to help," said {N}, and {he} took a deep breath.
| {His} knees shook, but {N} did not run away.
- {deed}.
| So {N} was brave. {deed}.
- "You came for me!" cried the {H}.
| "Thank you," said the {H}. "How brave you are!"
- {surprise}.
= After that, {N} was never afraid of {fear} again.
= {N} smiled, for being brave only means to be afraid and to go on.
= That night everybody talked about the brave little {hero}.
@ fear=the dark; crisis=One night {his} friend, the {H}, did not come home.; deed={He} walked out
    into the black night and called until the {H} answered; surprise=On the way home {N} looked up
    and saw that the dark was full of stars
@ fear=thunder; crisis=One evening a great storm came, and {his} friend, the {H}, was alone
    outside.; deed={He} ran through the rain and brought the {H} home; surprise=Safe inside, {N}
    found that thunder was only a big drum in the sky
@ fear=deep water; crisis=One day {his} friend, the {H}, fell into a pond.; deed={He} jumped right
    in and pulled the {H} out; surprise={N} was wet from head to toe, and the water had carried
    {him} gently
@ fear=high places; crisis=One day {his} friend, the {H}, was stuck at the top of a tall tree.;
    deed={He} climbed up, one branch at a time, and showed the {H} the way down; surprise=From up
    there, {N} had seen all the way to the blue hills

friend: friendship; friends; loneliness
? {a_hero} and {a_plain_helper}; two friends; {a_hero} looking for a friend
! sea
- {N} had everything {he} needed, except a friend.
| But {N} was [often|a little] lonely, for there was nobody to play with.
- One day {he} heard somebody [singing|crying|laughing] {spot}.
| One morning {he} saw somebody new {spot}.
- It was {a_helper} named {F}.
| There sat {a_helper} called {F}.
- "Will you play with me?" asked {N}. "I hoped you would ask," said {F}.
| "I am new here, and I know nobody," said {F}. "Now you know me," said {N}.
- They played {spot2} until the [stars came out|sun went down].
| They shared their {food} and told each other all their secrets.
| All day long they [ran|laughed] and [sang|played], and the day was much too short.
= And from that day on, neither of them was ever lonely again.
= When {N} went to bed that night, {he} was the happiest {hero} in the world.
= {N} and {F} stayed friends for ever.

lamp: lighthouses; a storm; the sea; a ship
? a lighthouse; a lighthouse in a storm; a ship in a storm; {a_hero} in a lighthouse
! at-lighthouse
- Every night the great lamp showed the ships the way home.
| Every evening {N} helped to light the lamp for the ships.
- One night the wind blew so hard that the lamp went out.
| One night a wild storm came, and the lamp went dark.
- Far out on the black water, a little boat was [lost|in trouble].
| Out there a small ship was heading for the rocks.
- {N} ran up all the [hundred|winding] stairs with a candle in {his} hand.
| "I must help," said {N}, and {he} climbed the stairs as fast as {he} could.
- Three times the wind blew out the flame, but the fourth time the lamp shone again.
| {His} hands were cold, but {he} lit the lamp again, and it shone across the waves.
- The little boat turned and came safely to the shore.
| In the morning a sailor knocked at the door. "Your light saved us," said the sailor.
= Since that night, the lamp has never gone out again.
= {N} was very tired and very proud.
= And the ships still ring their bells when they pass, to say thank you.

share: sharing; kindness; being generous
? sharing; a basket of {food}; {a_hero} with a basket of {food}
- One day {N} had a whole basket full of {food}.
| One morning {he} filled a big basket with {food}.
- "They are all for me," {he} said, and sat down {spot}.
| {He} sat down {spot} and wanted to eat them all alone.
- Then {a_helper} came along. The {H} had not eaten all day.
| Just then {a_helper} came by. "I am so hungry," said the {H}.
- {N} looked at the {food}, and then {he} looked at the {H}.
| {N} thought about it for a long time.
- "Sit down," said {N}. "Half of them are yours."
| "Please take some," {he} said.
- They ate together and laughed, and the {food} had never tasted so good.
| Side by side they ate until the basket was empty.
= And {N} learned that good things taste better when they are shared.
= {N} went home with an empty basket and a full heart.
= The next day the {H} came back with a basket of {food} for {N}.

found: honesty; being honest
? {a_hero} who found {a_thing}; {a_thing}; finding {a_thing}
! sea thing
- One morning {N} found {a_thing} {spot}. {use}.
| One day, {spot}, {he} found {a_thing}. {use}.
- {N} would have loved to keep it, but it was not {hers}.
| "Somebody must be missing it," thought {N}.
- {He} asked the {other}. "It is not mine," said the {other}.
| "Is this your {thing}?" {he} asked the {other}. But the {other} said no.
- At last {he} met {a_helper}, who was looking for something {spot2}.
| Then, {spot2}, {he} saw {a_helper} who was very sad.
- "My {thing}!" cried the {H}. "I thought it was gone for ever!"
| "You found my {thing}!" called the {H}, and danced with joy.
- To say thank you, the {H} gave {N} a bag of {food}.
| The {H} hugged {N}. "You have an honest heart," said the {H}.
|
= {N} walked home with empty hands and a happy heart.
= And {N} knew that giving it back had been the right thing to do.
= From then on they met every day and were the best of friends.

race: a race; patience; being proud
? a race; a race between {a_hero} and {a_plain_helper}; {a_hero} who runs a race
! slow
- {N} was the fastest runner of all, and {he} told everybody so.
| "Nobody is as fast as I am," {N} said every day.
- One day {a_helper} said, "Let us race to the {goal}." Everybody laughed.
| "I will race you to the {goal}," said {a_helper}. {N} laughed out loud.
- {N} ran so far ahead that {he} lay down {spot} for a little nap.
| Soon {N} was far ahead, so {he} stopped {spot} to eat some {food}.
- But the {H} went on, step by step, and never stopped.
| The {H} did not hurry, and the {H} did not rest.
- When {N} came to the {goal}, the {H} was already there.
| {N} jumped up and ran, but it was too late. The {H} had won.
- "Well done," said {N}, and {he} meant it.
| Everybody cheered for the {H}.
|
= From that day on, {N} never boasted again.
= And so {N} learned that slow and steady wins the race.
= Then they walked home together, slowly, and talked all the way.
@ goal=old mill
@ goal=big tree
@ goal=bridge
@ goal=hill

learn: learning; not giving up; trying again
? {a_hero} who wants to learn to {skill}; {a_hero} who could not {skill}; learning to {skill}
- More than anything, {N} wanted to learn to {skill}.
| Everybody could {skill}, only {N} could not.
- The first time {he} tried, {fail}.
| {He} tried, and {fail}. {He} tried again, and it was no better.
- "I will never learn it," said {N}.
| {N} sat down {spot} and sighed.
- "A little every day," said {a_helper}. "That is how I learned it."
| Then {a_helper} came by. "Try once more," said the {H}, "and go slowly."
- So {N} tried on Monday, and on Tuesday, and on every other day.
| So {N} tried again, day after day, and every day it went a little better.
- And one bright morning, {he} could {skill}.
| When spring came, {N} could {skill} better than anyone.
= "You see?" said the {H}, and they both laughed.
= And everybody came to see it and clapped their hands.
= {N} never again said that something was too hard.
@ skill=sing; fail=all the birds flew away
@ skill=dance; fail={he} fell over {his} own feet
@ skill=whistle; fail=only air came out
@ skill=swim; fail={he} swallowed half the pond
@ skill=bake bread; fail=the bread was as hard as a stone
@ skill=paint; fail=more paint landed on {him} than on the paper
@ skill=juggle; fail=the apples rolled all the way down the hill
@ skill=play the flute; fail=it sounded like a goose with a cold
@ skill=skate; fail={he} sat down on the ice with a bump
@ skill=fly a kite; fail=the kite landed in a tree
@ skill=read; fail=the letters ran about like ants

broken: telling the truth; honesty; the truth
? a broken {pot}; {a_hero} who broke a {pot}; telling the truth
- One afternoon {N} was playing {spot} and broke the {H}'s favourite {pot}.
| The {H} next door had a beautiful {pot}. One day {N} knocked it over, and it broke.
- Quickly {he} hid the pieces {spot2}.
| Nobody had seen it. "I will say nothing," thought {N}.
- But {he} could not play, and {he} could not eat {his} supper.
| But that night {his} heart was as heavy as a stone.
- At last {he} went to the {H}. "I broke your {pot}," said {N}, "and I am sorry."
| In the morning {N} told the {H} everything. "I am so sorry," {he} said.
- The {H} was quiet for a moment. "A {pot} can be mended," said the {H}.
| "Thank you for telling me the truth," said the {H}.
- Together they glued all the pieces, one by one.
|
= And {N} felt as light as a feather again.
= The {pot} was never quite the same, but now they were friends.
= From then on, {N} always told the truth.
@ pot=teapot
@ pot=blue vase
@ pot=flower pot
@ pot=lamp
@ pot=clock

astray: getting lost; home; coming home
? {a_hero} who lost the way home; a long way home; {a_hero} who got lost
- One day {N} followed a [white butterfly|strange bird|funny cloud] and [went much too far|forgot
    the way back].
| One afternoon {N} walked and walked, far away from home.
- Then the sun went down, and {he} did not know where {he} was.
| When {he} looked around, nothing looked like home.
- "I am lost," whispered {N}.
| {N} sat down {spot} and began to cry.
|
- Then a small light came closer. It was {a_helper} with a lantern.
| Suddenly {he} heard steps. It was {a_helper}. "Are you lost?" asked the {H}.
- "Do not be afraid," said the {H}. "I know the way."
| "Come with me," said the {H}, "and we will go together."
- They went over the hill and across the bridge, and there was home.
| They walked and sang all the songs they knew, until they saw a window full of light.
= {His} mother was waiting at the door, and there was warm soup for everyone.
= That night, {his} own bed felt like the best place in the world.
= And {N} learned that the best part of a journey is coming home.

wish: a wish; a star; magic; kindness
? a falling star; {a_hero} who makes a wish; a magic star
! sea
- One night {N} saw a star fall down {spot}.
| One night a tiny star fell out of the sky and landed {spot}.
- "You may make one wish," said the star in a small voice.
| "I must go back to the sky," said the star, "but first I will give you one wish."
- {N} thought of a mountain of {food}. {He} thought of a house of gold.
| {He} could wish for anything in the world.
- Then {he} saw {a_helper} who had {lack}.
| But then {N} thought of the {H}, who had {lack}.
- "I wish for {gift} for the {H}," said {N}.
| "Please give the {H} {gift}," said {N} softly.
- The star shone as bright as day, and the wish came true.
| There was a flash of silver light, and so it was.
= {N} had no wish left, but {he} felt rich.
= And every night the star looked down on {N} and smiled.
= The {H} never knew who had made the wish, but {N} did, and that was enough.
@ lack=no home; gift=a warm little house
@ lack=nothing to eat; gift=a table full of good things
@ lack=nobody to talk to; gift=a true friend
@ lack=no coat for the winter; gift=a thick warm coat

rescue: helping; kindness; helping others
? {a_hero} who helps {a_plain_helper}; {a_hero} and {a_plain_helper}; helping others
! small
- One day {he} heard a small voice call, "Help! Help!"
| One day somebody called for help.
- It was {a_helper} who was stuck {stuck}.
| There was {a_helper}, stuck {stuck}.
- Everybody else had walked past, but {N} stopped.
| "Hold on," said {N}. "I will help you."
- {He} pulled and pulled until the {H} was free.
| Very carefully, {he} set the {H} free.
- "One day I will help you too," said the {H}. {N} smiled, for the {H} was so small.
| "I will not forget it," said the little {H}.
- Winter came, and {N} was lost in the snow. But the {H} came and showed {him} the way.
| Not long after, {N} fell into a deep hole. It was the {H} who heard {him} and fetched a rope.
| When {N} was ill in bed, it was the {H} who came every day with hot soup.
= No kindness is too small, and no friend is too little.
= And so they helped each other for the rest of their lives.
= "Now we are even," said the {H}, and they both laughed.
@ stuck=in the mud
@ stuck=in a thorn bush
@ stuck=under a fallen branch
@ stuck=in an empty jar

seed: patience; a seed; spring; growing things; a tree
? a little seed; {a_hero} who plants a seed; waiting for spring
! outdoors
- One spring day {N} planted a tiny seed {spot}.
| One day the {other} gave {him} a seed, and {N} planted it {spot}.
- Every morning {he} gave it water, but nothing happened.
| {He} waited one day, two days, ten days. Nothing came up.
- "Nothing will ever grow there," said the {other}.
| "Perhaps it is asleep," said {N}.
- "Good things take time," said {a_helper}.
| But {a_helper} said, "Wait for the rain and the sun."
- Then, after a warm night of rain, there was a small green leaf.
| One morning something green looked out of the earth.
- It grew and grew, and by summer it was a [tree full of apples|tree full of plums|tall sunflower].
| By the end of summer it was taller than {N}.
= {N} and the {H} sat in its shade and were glad that they had waited.
= And in autumn it gave {N} a hundred new seeds, enough for everyone.
= {N} was the proudest gardener in the land.

birthday: a birthday; a surprise; a party
? a birthday; {a_hero} who has a birthday; a birthday party; a surprise party
! thing
- It was {his} birthday, but nobody said a word about it.
| Today was {his} birthday.
- The {other} was in a hurry. "I have no time today," said the {other}.
| The {other} only giggled and ran away.
- Even the {H} closed the door when {N} came by.
| And the {H} was not at home.
|
- {N} sat {spot} and felt very sad. "They have all forgotten me," {he} thought.
| All day long {N} sat alone {spot}.
- In the evening {he} went home. The house was dark. "Surprise!" cried everybody.
| But when {he} opened {his} own door, a hundred candles were lit. "Surprise!"
- There was a cake, and there was {a_thing} with a ribbon around it.
| There were {food} and songs, and the {H} gave {him} {a_thing}.
= It was the best birthday of all.
= Nobody had forgotten {N}. They had only been busy baking the cake.
= They danced until midnight, and {N} danced most of all.

guest: winter; snow; kindness to strangers; a cold night
? a cold winter night; a stranger at the door; {a_hero} in the snow; winter
! thing
- One cold winter night, somebody knocked at the door.
| One night it snowed and snowed, and there was a knock at the door.
- It was {a_helper}, white with snow from head to toe.
| Outside stood {a_helper}, shaking with cold.
- "May I warm myself by your fire?" asked the {H}.
| "Please let me in," said the {H}. "I have come a long way."
- {N} had only a little soup, but {he} gave half of it to the {H}.
| "Come in," said {N}. {He} gave the {H} {his} chair and {his} blanket.
- All night long the {H} told stories of faraway lands.
| They talked until the fire burned low.
- In the morning the guest was gone. On the table lay {a_thing}.
| Before leaving, the {H} gave {N} {a_thing}. {use}.
= {N} kept it for ever and thought of the {H} whenever it snowed.
= And from that night on, the door of {N} was always open.
= For a warm heart is the best fire of all.

sleep: sleep; the moon; the night; bedtime; dreams
? {a_hero} who could not sleep; the moon; going to sleep; a sleepy {hero}
- One night {N} could not sleep. {He} turned to the left. {He} turned to the right.
| It was late, but {N} was wide awake.
- {He} counted sheep, but the sheep ran away.
| {He} shut {his} eyes, but they popped open again.
|
- "Dear moon, why can I not sleep?" asked {N}.
| Then the moon looked in. "Are you still awake?" it asked.
- "Close your eyes and listen," said the moon.
| "Lie very still," said the moon, "and tell me what you hear."
- {N} heard the wind in the leaves and the water far away.
| First {N} heard the wind. Then {he} heard the rain. Then {he} heard {his} own heart.
- {His} breath grew slow, and {his} eyes grew heavy.
| {He} counted one star, two stars, three stars.
|
= And before {he} could say good night, {N} was fast asleep.
= The moon smiled and kept watch until morning.
= Soon {he} was dreaming of a boat that sailed among the stars.

map: treasure; adventure; a journey
? a treasure; an old map; {a_hero} who finds a treasure map; a great adventure
! thing
- One day {N} found an old map {spot}.
| One rainy day an old map fell out of an old book.
- A thin red line led over the hills to a cross.
| In one corner somebody had painted a cross, and that could only mean a treasure.
- {He} showed it to {a_helper}. "Let us go!" said the {H}.
| "Will you come with me?" {he} asked {a_helper}. "Of course," said the {H}.
- They crossed a river, they climbed a hill, and they slept under the stars.
| They walked for three days and shared their last {food}.
- Under a flat stone they found a wooden box.
| They dug where the cross was, and they found a small box.
- There was no gold in it, only {a_thing} and a note.
| Inside lay {a_thing} and a piece of paper.
= "The real treasure," said the note, "is the friend who came with you."
= It was not much of a treasure, but it had been a great adventure.
= {N} gave it to the {H}, for {he} had already found the best treasure, a friend.

trick: being clever; a wolf; a monster; a clever trick
? a hungry {ogre}; {a_hero} and a hungry {ogre}; a clever {hero}; a {ogre}
- One evening a hungry {ogre} jumped out from {behind}.
| One day {N} met a big hungry {ogre} on the road.
- "I am going to eat you up!" said the {ogre}.
| "You look tasty," said the {ogre}.
- "Please do," said {N}, "but first you must {task}."
| {N} thought fast. "You may," {he} said, "if you can {task}."
- "That is easy," said the {ogre}, and began.
| The {ogre} laughed and began at once.
- {outcome}.
- {N} tiptoed away and ran home.
| By then, {N} was safe in {his} own bed.
|
= For a clever head is better than big teeth.
= The {ogre} was so ashamed that nobody ever saw it again.
= And when {N} told the story, everybody laughed until they cried.
@ ogre=wolf; behind=the trees
@ ogre=troll; behind=under a bridge
@ ogre=monster; behind=a dark cave
& task=count all the stars; outcome=The {ogre} counted and counted, and fell asleep at a hundred
    and one
& task=drink up the whole pond; outcome=The {ogre} drank and drank, until it was too full to move
& task=catch your own shadow; outcome=The {ogre} ran round and round, until it was too dizzy to
    stand

laugh: laughter; a sad queen; a sad king; joy
? a {royal} who could not laugh; {a_hero} who made the {royal} laugh; a sad {royal}
- In those days the {royal} of the land had not laughed for a whole year.
| Now the {royal} of that land was so sad that nobody could make {r_him} laugh.
- Clowns came and went. Nothing helped.
| The best doctors came with their biggest books, but nothing helped.
- "I will try," said {N}, and {he} set out for the palace with a bag of {food}.
| {N} packed a bag of {food} as a gift and walked to the palace.
- But at the throne {he} slipped, and the {food} flew through the air.
| But {he} was so nervous that {he} tripped over the carpet. All the {food} rolled away.
- One landed on the nose of the {royal}.
| One of them landed right in the crown of the {royal}.
- It was very quiet. Then the {royal} began to laugh, and could not stop.
| First the {royal} smiled. Then the whole palace shook with laughter.
= From then on, {N} had supper at the palace every Sunday.
= "That is the best gift of all," said the {royal}.
= And all the land laughed with the {royal} for seven days.
@ royal=king; r_him=him
@ royal=queen; r_him=her

bridge: hard work; building a bridge; a flood
? a bridge; {a_hero} who built a bridge; building something; a river
- There was a wide river nearby, and no way to cross it.
| Every day {N} looked across the river and wondered what was on the other side.
- "I will build a bridge," said {N}. The {other} only laughed.
| So {N} began to build a bridge, one stone at a time.
- Every morning {he} carried one stone. Every evening {he} was tired.
| "That will take for ever," said the {other}. But {N} did not stop.
- Then {a_helper} came and carried a stone too.
| One day {a_helper} said, "I will help you." Now it went twice as fast.
- Soon others came and helped, and in autumn the bridge was done.
| When the first snow fell, the bridge was ready.
- That winter the great flood came, and everybody crossed the bridge and was safe.
| On the other side they found new friends and a field of flowers.
|
= It is still there today, and it is called the bridge of {N}.
= Many small stones make a long bridge.
= And {N} was the first to walk across, hand in hand with the {H}.

rain: rain; a dry summer; clouds; the weather
? a cloud; a rainy day; {a_hero} who talks to a cloud; the rain
- It had not rained for a hundred days, and every flower hung its head.
| One summer no rain fell at all, and the wells ran dry.
- So {N} climbed the highest hill and called to a big grey cloud.
| {N} saw one lonely cloud in the sky and climbed a hill to talk to it.
- "Why do you not rain?" {he} asked.
| "Please give us some rain," said {N}.
- "I am too sad to rain," said the cloud. "Nobody ever talks to me."
| "Nobody is ever glad to see me," said the cloud.
- So {N} sat down and told the cloud all the stories {he} knew.
| {N} sang a song for the cloud, and then another, and then a third.
- The cloud laughed until it cried, and its tears fell as rain.
| Then the cloud was so happy that it rained all night long.
= In the morning the whole land was green.
= And since that day, {N} waves at every cloud.
= Everybody danced in the rain, and {N} danced most of all.

egg: caring; an egg; a bird; spring
? an egg; a little bird; {a_hero} who found an egg; {a_hero} and a bird
- One cold morning {N} found a [blue|small|white] egg {spot}. Its mother was nowhere to be seen.
| One day {he} found an egg {spot}, and it was all alone.
- "Somebody must keep you warm," said {N}, and {he} wrapped it in a scarf.
| {He} carried it home and put it in a basket by the fire.
- "It will never hatch," said the {other}. But {N} did not give up.
| {He} kept it warm for seven days and seven nights.
- Then the egg cracked, and out came a tiny bird.
| One night there was a tapping and a cracking, and there sat a little bird.
- "Are you my mother?" asked the bird. "No," said {N}, "but I am your friend."
| From then on, the little bird followed {him} everywhere.
- In autumn the bird flew away to the south, and {N} waved for a long time.
|
= And every spring, the bird came back to sing for {N}.
= When it sings in the morning, {N} still sings along.
= It was a very small bird, but it was a very great friend.

bottle: a letter; faraway friends; a message in a bottle; writing
? a message in a bottle; a bottle; {a_hero} who wrote a letter
- One day {N} wrote a letter, put it in a green bottle and threw it into the water.
| "I would like a friend," {N} wrote on a piece of paper, and {he} put it in a bottle.
- Away it went, past ships and whales, around the whole wide world.
| The water carried it away, over the waves and out of sight.
- {N} waited all summer long. {N} waited until the leaves fell.
| Every morning {he} looked for an answer, and every evening {he} went home alone.
- Then, one stormy day, the bottle was back, and there was a new letter in it.
| But one morning the bottle came back with another letter inside.
- "Dear {N}," it said, "I am {F}, and I live at the other end of the world."
| "I found your letter," it said, "and I would like a friend too. Yours, {F}."
= And they wrote to each other for the rest of their lives.
= The next summer {F} came on a ship, and they knew each other at once.
= {N} read it a hundred times, and {he} was never lonely again.
"""


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

# --- telling -------------------------------------------------------------------------------------

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


# --- asking --------------------------------------------------------------------------------------

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
RARE_NOUNS = _words(
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
SYLLABLES = _words(
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
    (wish,) = rng.choices(wishes, (0.16, 0.12, 0.09, 0.12, 0.12, 0.39))
    about, story = wish(rng)
    about = fill(rng, about, story.words)
    asked = {"t": about, "T": about[0].upper() + about[1:]}
    return fill(rng, rng.choice(TOPIC_ASKS), asked), story


GOODS = _words("apples eggs books pencils coins stamps cards marbles tickets cakes shirts flowers")
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
    """Print stories or chats to read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="the seed (default 0)")
    parser.add_argument("--about", help='a topic, such as "a brave fox" or "a lost key"')
    parser.add_argument("--chats", action="store_true", help="print chats instead of stories")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.n):
        if options.chats:
            messages, story = chat(rng)
            for message in messages:
                print(f"{message['role']}: {message['content']}")
            print(f"assistant: {story}\n")
        else:
            print(tell(rng, options.about).text + "\n")


if __name__ == "__main__":
    main()
