"""`--task translate`: a text in another language."""

from __future__ import annotations

from producer.tasks.base import Argument, Task

TRANSLATE = Task(
    name="translate",
    help="Translate a text into --task-arg target_language=….",
    inputs=("text", "source", "sentence", "content", "document", "prompt"),
    arguments=(
        Argument(
            "target_language", "The language to write.", "target_language=French", required=True
        ),
        Argument("source_language", "The language of the text.", "source_language=English"),
    ),
    system="You are a careful translator: you keep meaning, tone and layout.",
    user="""\
Translate this text{{ ' from ' ~ source_language if source_language else '' }} into \
{{ target_language }}. Give the translation alone.

{{ text }}""",
    # The examples name a language each, so that the last line's is understood as the one to write.
    few_shot="""\
{%- set source = ' (' ~ source_language ~ ')' if source_language else '' -%}
{%- set english = ' (English)' if source_language else '' -%}
Each text is followed by its translation into the language that is named.

Text{{ english }}: The train to the coast leaves at nine.
French: Le train pour la côte part à neuf heures.

Text{{ english }}: Thank you for the letter. I read it twice.
German: Danke für den Brief. Ich habe ihn zweimal gelesen.

Text{{ english }}: Where can we buy fresh bread?
Spanish: ¿Dónde podemos comprar pan fresco?

Text{{ source }}: {{ text }}
{{ target_language }}:""",
    params={"max_tokens": 1024, "temperature": 0.0, "stop": ("\nText:", "\nText (")},
)
