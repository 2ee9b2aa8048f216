"""`--task summarize`: a text in a few sentences."""

from __future__ import annotations

from producer.tasks.base import Task

SUMMARIZE = Task(
    name="summarize",
    help="Say what a text says, in a few sentences.",
    inputs=("text", "document", "article", "content", "prompt"),
    system="You summarize texts faithfully: every point is in the text, none is your own.",
    user="Summarize this text in one to three sentences. Give the summary alone.\n\n{{ text }}",
    few_shot="""\
Each text is followed by its summary in one to three sentences.

Text: The town library will be closed for the first two weeks of August while its roof is \
repaired. Books that fall due in that time may be returned until the end of the month without a \
fee. The children's reading hour moves to the school next door.
Summary: The library closes for two weeks in August for roof repairs. Loans are extended, and the \
reading hour moves to the school.

Text: Bakers have long known that dough left overnight tastes better. The reason is time: at low \
temperatures yeast works slowly, while other microbes go on making the acids that give bread its \
flavour. A dough that rises in an hour is just as light, but it has less to say.
Summary: Dough that rests overnight in the cold tastes better, because flavour-giving acids form \
while the yeast works slowly.

Text: {{ text }}
Summary:""",
    params={"max_tokens": 256, "temperature": 0.3, "stop": ("\nText:",)},
)
