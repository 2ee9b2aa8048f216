"""`--task extract`: from each text what `--schema` asks for, as JSON."""

from __future__ import annotations

from producer.tasks.base import Task

EXTRACT = Task(
    name="extract",
    help="Take out of a text what --schema asks for, as JSON.",
    inputs=("text", "content", "document", "prompt"),
    optional=("instruction",),
    takes_schema=True,
    system="You take facts out of texts: you answer with one JSON value and nothing else.",
    user="""\
Take out of the text what this JSON schema asks for.\
{{ ' ' ~ instruction if instruction else '' }}

Schema: {{ schema }}

Text: {{ text }}

Answer with the JSON alone.""",
    # Schemas of their own in the examples: they show that the schema rules, not the text.
    few_shot="""\
Each text is followed by a JSON schema and by what the schema asks for, as JSON.

Text: Mira Holt bought two lamps for 35 euros on Monday.
Schema: {"type": "object", "properties": {"buyer": {"type": "string"}, \
"price": {"type": "number"}}, "required": ["buyer", "price"]}
JSON: {"buyer": "Mira Holt", "price": 35}

Text: The ferry calls at Oban, Craignure and Tobermory, but not in winter.
Schema: {"type": "object", "properties": {"ports": {"type": "array", "items": \
{"type": "string"}}, "winter": {"type": "boolean"}}, "required": ["ports", "winter"]}
JSON: {"ports": ["Oban", "Craignure", "Tobermory"], "winter": false}

Text: {{ text }}
{% if instruction %}Instruction: {{ instruction }}
{% endif %}Schema: {{ schema }}
JSON:""",
    params={"max_tokens": 1024, "temperature": 0.0, "stop": ("\nText:",)},
)
