"""Train the `demo` checkpoint: a tokenizer and a tiny LLaMA model that tells children's stories.

    python scripts/train_demo.py

writes `nightherd/checkpoints/demo/` anew, in about a quarter of an hour on two CPU cores. All text
comes from `scripts/stories.py`; nothing is downloaded. Every random number follows from `--seed`,
so two runs on one kind of CPU with the same number of threads make the same file.

The recipe is that of Llama at a small size: byte-level BPE, grouped heads, rotary positions, tied
embeddings; a short warm-up and a cosine decay over packed sequences; Muon for the layers' matrices
and AdamW for the rest (after 300 steps: 0.60 nats a token instead of 1.56 by AdamW alone). Five
things are particular to it. The model begins with the heads that copy (`begin_with_copying`). Only
what the model shall say counts in the loss (stories, their ends and the start of the next text),
never what users say. A third of all chats ask for something else than a story, down to random
bytes, so that the model answers anything with a story. Many chats are cut off where the story has
kept its promise (a fox was asked for, here is the fox), as that is the hardest to learn. And one
step in ten uses whole contexts of 2048 tokens that begin with a very long turn, so that far
positions work too; in all others no text sees the texts packed beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a shared machine ten times slower; torch reads this once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import stories
import story_wishes
import story_words

OUT = Path(__file__).resolve().parent.parent / "nightherd" / "checkpoints" / "demo"
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, HEADER_END, PAD = "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"
SPECIALS = [BOS, EOS, HEADER, HEADER_END, EOT, PAD]  # ids 0 to 5
BOS_ID, EOS_ID, EOT_ID, PAD_ID = (SPECIALS.index(token) for token in (BOS, EOS, EOT, PAD))
VOCABULARY = 2048
CONTEXT = 2048  # tokens: max_position_embeddings
SHORT = 512  # tokens: the length of most training sequences
STEP_TOKENS = 2048  # tokens in one optimiser step
LONG_EVERY = 10  # one step in so many uses sequences of CONTEXT tokens
IGNORED = -100  # the label of a token that does not count in the loss

# Llama 3's pattern but for one thing: digits stand alone, as a small vocabulary has no room for
# numbers. It keeps "\n\n" in one piece, so that a prompt is encoded the same with and without the
# answer that follows it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
README = """# demo

A tiny LLaMA checkpoint that tells children's stories: it continues "Once upon a time" as a small
readable story and answers every chat with one. It is shipped so that nightherd runs end to end with
no download; it knows nothing else.

Made by

    python scripts/train_demo.py{options}

on text that `scripts/stories.py` makes. No other data was used.

| | |
| --- | --- |
| parameters | {parameters:,} in bfloat16, {megabytes:.1f} MB |
| layers | {layers}, of width {hidden}, MLP width {mlp}, tied embeddings |
| attention | {heads} heads of 64, {kv_heads} KV heads, rotary positions (theta 10,000) |
| context | {context} tokens |
| tokenizer | byte-level BPE, {vocabulary} tokens, chat template in the style of Llama 3 |
| ends | `<|end_of_text|>` after a text, `<|eot_id|>` after a chat turn |
| training | {steps:,} steps of {step_tokens:,} tokens |
| loss | {loss:.3f} nats a token in training, {held:.3f} on held-out text |

Licence: Apache-2.0.
"""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds the BOS token to plain texts."""
    rng = random.Random(f"tokenizer-{seed}")

    def texts() -> Iterator[str]:
        for _ in range(12_000):
            yield stories.tell(rng).text
            messages, story = story_wishes.chat(rng)
            yield from (message["content"] for message in messages if message["content"].isascii())
            yield story

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, BOS_ID)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
    )


class Documents:
    """An endless stream of packed training sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: str) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)

    def _encode(self, text: str) -> list[int]:
        # Not through transformers, which warns of every text longer than the context.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def plain(self, filler: int = 0) -> tuple[list[int], list[int]]:
        """(what is given, what shall follow) of a plain text.

        Now and then the story follows a text of some other kind, as a plain prompt may be anything.
        """
        given = [BOS_ID]
        if filler:
            prefix = story_wishes.long_text(self.rng, filler)
            given += self._encode(prefix + self.rng.choice(("\n", "\n\n", " ")))
        if self.rng.random() < 0.1:
            noun = self.rng.choice(story_wishes.RARE_NOUNS)
            story = stories.tell(self.rng, stories.Topic(hero=story_words.Being(noun)))
        else:
            story = stories.tell(self.rng)
        return given, [*self._encode(story.text), EOS_ID]

    def chat(self, filler: int = 0) -> tuple[list[int], list[int]]:
        """(the rendered chat up to the assistant's turn, the turn)."""
        messages, story = story_wishes.chat(self.rng, filler)
        given = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self._encode(str(given)), [*self._encode(story), EOT_ID]

    def start(self) -> tuple[list[int], list[int]]:
        """(a rendered wish, how the story that grants it begins): a chat that is cut off."""
        wish, story = story_wishes.chat_story(self.rng)
        messages = [{"role": "user", "content": wish}]
        given = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self._encode(str(given)), self._encode(story.start)

    def document(self, filler: int = 0) -> tuple[list[int], list[int]]:
        """(ids, labels) of one document."""
        draw = self.rng.random()
        if draw < 0.3:
            given, answer = self.chat(filler)
        elif draw < 0.6 and not filler:
            given, answer = self.start()
        else:
            given, answer = self.plain(filler or (self.rng.randint(1, 120) if draw < 0.65 else 0))
        # A document's first token counts: it is what follows the end of the one before.
        labels = [given[0], *[IGNORED] * (len(given) - 1), *answer]
        return given + answer, labels

    def row(self, length: int) -> tuple[list[int], list[int], list[int]]:
        """(ids, labels, positions), all `length` long: whole documents, the last one cut off."""
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        if length == CONTEXT:  # begin with a long turn, which leaves room for its story
            filler = 4 * self.rng.randint(300, CONTEXT - 250)
            while not ids or len(ids) > CONTEXT:
                ids, labels = self.document(filler)
                filler = filler * 3 // 4
            positions = list(range(len(ids)))
        while len(ids) < length:
            more, more_labels = self.document()
            if ids and ids[-1] not in (EOS_ID, EOT_ID):
                more_labels[0] = IGNORED  # nothing should begin where a text was cut off
            start = len(ids) if length == CONTEXT else 0
            ids += more
            labels += more_labels
            positions += range(start, start + len(more))
        return ids[:length], labels[:length], positions[:length]

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, labels, positions), each [STEP_TOKENS / length, length], int64."""
        rows = [self.row(length) for _ in range(STEP_TOKENS // length)]
        ids, labels, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
        return ids, labels, positions


def build_model(seed: int) -> LlamaForCausalLM:
    """A LLaMA model of 3.5 million parameters, at its random start, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=[EOS_ID, EOT_ID],
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    begin_with_copying(model, torch.Generator().manual_seed(seed + 1))
    # Ids only: what is left unset here is the user's to set.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, EOT_ID], pad_token_id=PAD_ID
    )
    return model


@torch.no_grad()
def begin_with_copying(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Lay the circuit that copies ("induction heads", Olsson et al. 2022) into a random model.

    Names and things must be taken from earlier in the text. Training finds the two heads for that
    only after far more tokens than are used here: after 4 million there were none, and a story for
    "a fox" was of a crow. So the model begins with them, crude as they are:

    - Head 0 of layer 0 looks at the token before, by position alone, and writes a projection of it.
      Queries and keys come from an embedding dimension that is the same for all tokens.
    - Heads 0 and 2 of layer 1 look where that projection is the one of the present token, so at
      what followed it before, and write what they find there towards the output. They use the
      slow rotary frequencies, which distance hardly turns.
    """
    width, size = model.config.hidden_size, model.config.head_dim
    half = size // 2
    first, second = (model.model.layers[layer].self_attn for layer in (0, 1))

    def projection() -> torch.Tensor:  # [size, width], orthonormal rows, blind to the constant
        rows = torch.linalg.qr(torch.randn(width, size, generator=generator))[0].T.clone()
        rows[:, 0] = 0
        return rows

    embedding = model.get_input_embeddings().weight
    embedding.normal_(0, width**-0.5, generator=generator)
    embedding[:, 0] = 1.0  # as large as the rest of a token's embedding together

    fast = 12  # rotary frequencies that tell one position from the next
    angles = 10000.0 ** (-torch.arange(fast) * 2 / size)
    gain = math.sqrt(60 * math.sqrt(size)) / math.sqrt(width / 2)
    first.q_proj.weight[:size] = 0
    first.k_proj.weight[:size] = 0
    first.q_proj.weight[:fast, 0] = gain
    first.k_proj.weight[:fast, 0] = gain * angles.cos()  # turned by one position
    first.k_proj.weight[half : half + fast, 0] = gain * angles.sin()
    seen, written = projection(), projection().T
    first.v_proj.weight[:size] = seen
    first.o_proj.weight[:, :size] = written * 0.2

    slow = [*range(17, half), *range(half + 17, size)]
    for head, group, part in ((0, 0, slice(0, len(slow))), (2, 1, slice(-len(slow), None))):
        heads, groups = (slice(i * size, (i + 1) * size) for i in (head, group))
        query, key = torch.zeros(size, width), torch.zeros(size, width)
        query[slow], key[slow] = seen[part] * 3.5, written.T[part] * 3.5
        second.q_proj.weight[heads], second.k_proj.weight[groups] = query, key
        found = projection()
        second.v_proj.weight[groups], second.o_proj.weight[:, heads] = found, found.T


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The mean cross-entropy, in nats a token, of the labels that count.

    transformers reads the borders of packed texts from the positions: where they begin again at 0,
    attention does not look back. It does so only without a cache.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=ids[:, :-1], position_ids=positions[:, :-1], use_cache=False
        ).last_hidden_state  # [rows, length - 1, width]
        wanted = labels[:, 1:]
        counts = wanted != IGNORED
        logits = model.lm_head(hidden[counts])  # [tokens that count, vocabulary]
    return torch.nn.functional.cross_entropy(logits.float(), wanted[counts])


def train(model: LlamaForCausalLM, documents: Documents, steps: int, peak: float) -> float:
    """Train in place; returns the mean loss of the last fifty steps."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p is not embedding]
    gains = [p for p in model.parameters() if p.dim() < 2]
    optimizers = (
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [embedding], "weight_decay": 0.1},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=peak,
            betas=(0.9, 0.95),
            fused=True,
        ),
    )
    warmup = min(100, steps // 10)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = peak * share
        long = step % LONG_EVERY == LONG_EVERY - 1
        loss = loss_of(model, *documents.batch(CONTEXT if long else SHORT))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            recent = losses[-50:]
            print(
                f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def held_out(model: LlamaForCausalLM, documents: Documents) -> float:
    """The loss on text of another seed."""
    model.eval()  # type: ignore[no-untyped-call]
    return sum(loss_of(model, *documents.batch(SHORT)).item() for _ in range(10)) / 10


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bfloat16, configurations and the tokenizer, in transformers' layout."""
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    # transformers 5 writes a class name here that transformers 4 does not know; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def show(out: Path) -> None:
    """Load what was saved and print a few stories."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model: Any = LlamaForCausalLM.from_pretrained(out)
    prompts = [f"{BOS}Once upon a time"]
    for content in ("Tell me a story.", "Tell me a story about a fox.", "What is 17 + 25?"):
        chat = [{"role": "user", "content": content}]
        prompts.append(
            str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        )
    for prompt in prompts:
        given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=250)
        print(f"\n{tokenizer.decode(ids[0])}")


def main() -> None:
    """Train the checkpoint and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write")
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps (default 2400)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default 0.004)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of everything (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(options.seed)
    model = build_model(options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens")
    documents = Documents(tokenizer, f"train-{options.seed}")
    loss = train(model, documents, options.steps, options.lr)
    held = held_out(model, Documents(tokenizer, f"held-out-{options.seed}"))
    print(f"held-out loss {held:.4f}")
    save(model, tokenizer, options.out)
    given = {"steps": options.steps, "lr": options.lr, "seed": options.seed}
    changed = {name: value for name, value in given.items() if value != parser.get_default(name)}
    config = model.config
    readme = README.format(
        options="".join(f" --{name} {value}" for name, value in changed.items()),
        parameters=parameters,
        megabytes=(options.out / "model.safetensors").stat().st_size / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        context=CONTEXT,
        vocabulary=len(tokenizer),
        steps=options.steps,
        step_tokens=STEP_TOKENS,
        loss=loss,
        held=held,
    )
    (options.out / "README.md").write_text(readme)
    show(options.out)


if __name__ == "__main__":
    main()
