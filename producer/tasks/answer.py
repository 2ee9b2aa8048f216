"""`--task answer`: an answer to a question, from a context where the row has one."""

from __future__ import annotations

from producer.tasks.base import Task

ANSWER = Task(
    name="answer",
    help="Answer a question, from the column `context` where a row has it.",
    inputs=("question", "query", "prompt", "text"),
    optional=("context",),
    system="You answer questions correctly and to the point.",
    user="""\
{% if context %}Answer the question from the context alone. If the answer is not there, say so.

Context: {{ context }}

Question: {{ question }}{% else %}{{ question }}{% endif %}""",
    few_shot="""\
{% if context -%}
Each question is answered from the context above it.

Context: The bridge was opened in 1932. It carries two lanes of traffic and a footpath, and it is \
painted every seven years.
Question: How often is the bridge painted?
Answer: Every seven years.

Context: Mira keeps bees. In a good summer each of her four hives gives about twenty jars of honey.
Question: How many jars can she fill in a good summer?
Answer: About eighty: four hives give twenty jars each.

Context: {{ context }}
Question: {{ question }}
Answer:
{%- else -%}
Each question is followed by its answer.

Question: Which planet is nearest to the sun?
Answer: Mercury.

Question: A box holds 12 eggs. How many eggs are in 3 boxes and a half?
Answer: Three boxes hold 3 × 12 = 36 eggs and half a box holds 6, so there are 42.

Question: Why does ice float on water?
Answer: Ice is less dense than liquid water, because its molecules stand farther apart.

Question: {{ question }}
Answer:
{%- endif %}""",
    params={"max_tokens": 256, "temperature": 0.0, "stop": ("\nQuestion:", "\nContext:")},
)
