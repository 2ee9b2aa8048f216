"""`--task classify`: one label out of `--labels` for each text."""

from __future__ import annotations

from producer.tasks.base import Task

CLASSIFY = Task(
    name="classify",
    help="Give a text one of --labels a,b,c.",
    inputs=("text", "sentence", "content", "document", "prompt"),
    takes_labels=True,
    system="You sort texts: you answer with one of the labels that are given, and nothing else.",
    user="""\
Which of these labels fits the text best: {{ labels | join(', ') }}?

Text: {{ text }}

Answer with the label alone, exactly as it is written above.""",
    # Labels of their own in the examples: they show the form and favour none of the user's.
    few_shot="""\
Each text is given the one of its labels that fits best.

Text: The soup was cold and nobody came to ask.
Labels: praise, complaint
Label: complaint

Text: The goalkeeper saved two penalties in the last ten minutes.
Labels: politics, music, sport
Label: sport

Text: Could you send me the invoice for March?
Labels: request, thanks
Label: request

Text: {{ text }}
Labels: {{ labels | join(', ') }}
Label:""",
    # max_tokens comes from the longest label, structured_outputs from all of them.
    params={"temperature": 0.0, "stop": ("\nText:",)},
)
