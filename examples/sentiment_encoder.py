"""Trains a small BERT on sentences with negations, offline, and shows which words and phrases decide its class.

    python -m examples.sentiment_encoder            # about a minute on one thread; writes out/sentiment/

A sentence has one or two clauses; "not" and "never" negate a clause, and after "but" the second clause decides.
So the class of "not bad" is not a sum over its words; contextual decomposition of phrases is made for that.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import mechinterp as mi

NOUNS = ["film", "movie", "book", "story", "plot", "song", "food", "service", "room", "view", "acting", "script"]
VERBS = ["was", "is", "seemed", "felt"]
GOOD = ["good", "great", "lovely", "fun", "brilliant", "charming", "fresh", "superb"]
BAD = ["bad", "awful", "dull", "boring", "weak", "clumsy", "stale", "poor"]
ADVERBS = ["very", "really", "quite", "so"]
NEGATIONS = ["not", "never"]
OTHERS = ["the", "this", "that", "but", "and", "."]
LABELS = ("negative", "positive")
LONGEST = 24
SENTENCES = ["the film was not bad .", "the plot was dull but the acting was superb ."]


def sentence(rng: random.Random) -> tuple[str, int]:
    """A sentence and its class: 1 is positive."""
    first, good = clause(rng)
    if rng.random() < 0.4:
        second, good = clause(rng)
        return f"{first} but {second} .", int(good)
    return f"{first} .", int(good)


def clause(rng: random.Random) -> tuple[str, bool]:
    """A clause and whether it is positive."""
    good, negated = rng.random() < 0.5, rng.random() < 0.4
    words = [rng.choice(["the", "this", "that"]), rng.choice(NOUNS), rng.choice(VERBS)]
    words += [rng.choice(NEGATIONS)] * negated + [rng.choice(ADVERBS)] * (rng.random() < 0.4)
    return " ".join([*words, rng.choice(GOOD if good else BAD)]), good != negated


def build_tokenizer() -> Any:
    """One token per word; [CLS] before a sentence and [SEP] after it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *OTHERS, *NOUNS, *VERBS, *GOOD, *BAD, *ADVERBS, *NEGATIONS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def train(steps: int, seed: int = 0) -> tuple[Any, Any, float]:
    """(the model, its tokenizer, its accuracy on 1,000 sentences that it was not trained on)."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    held_out = [sentence(rng) for _ in range(1000)]
    unseen = {text for text, _ in held_out}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        batch = [pair for pair in (sentence(rng) for _ in range(64)) if pair[0] not in unseen]
        loss = model(**_batch(tokenizer, batch), labels=torch.tensor([label for _, label in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        guesses = model(**_batch(tokenizer, held_out)).logits.argmax(-1)
    accuracy = float((guesses == torch.tensor([label for _, label in held_out])).float().mean())
    return model, tokenizer, accuracy


def _batch(tokenizer: Any, pairs: list[tuple[str, int]]) -> Any:
    return tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt", return_token_type_ids=False)


def main() -> None:
    """Trains, saves, loads again, decomposes some sentences and writes their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("out/sentiment"))
    parser.add_argument(
        "sentences", nargs="*", default=["the film was not bad .", "the plot was dull but the acting was superb ."]
    )
    arguments = parser.parse_args()
    model, tokenizer, accuracy = train(arguments.steps)
    model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    print(f"accuracy on 1,000 held-out sentences: {accuracy:.1%}; model in {arguments.out / 'model'}")
    encoder = mi.load_encoder(str(arguments.out / "model"))
    for number, text in enumerate(arguments.sentences):
        found = mi.phrase_relevance(encoder, text, "positive", against="negative", max_words=3)
        page = arguments.out / f"sentence-{number}.html"
        mi.save_html(mi.text_page(found, title=text), page)
        strongest = found.to_frame().sort_values("relevance", key=abs, ascending=False).head(8)
        print(f"\n{text}  (positive rather than negative: {found.total:+.2f} logits; {page})")
        print(strongest.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
