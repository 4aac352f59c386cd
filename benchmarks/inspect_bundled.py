"""Print what each head of a bundled-like model does: attention, direct effect, mean-ablation.

python benchmarks/inspect_bundled.py [DIRECTORY] [--per-template N]

Columns, each a mean over held-out IOI prompts (IO, S1, S2, end as in Wang et al. 2022) or repeated random words:
  end>IO, end>S1, end>S2   attention of the last token                     (name movers, S-inhibition)
  end>rest                 attention of the last token to the words after S2, itself included (relay)
  S2>S1, S2>S1+1, S2>IO    attention of the repeated name                  (duplicate token, induction, relay)
  prev, ind                attention to the token before; to the token after the last time this token was here
  direct                   logits that the head's output at the last token adds to IO minus S (final norm held fixed)
  drop, @end, @S2, @S1+1   fall of the logit difference, in percent, when the head's output is replaced by its mean
                           over prompts with three unrepeated names of the same template and position:
                           everywhere, at one place
  movers                   fall of the attention end>IO minus end>S1 of the strongest name mover (largest `direct`)
                           under the ablation everywhere
  ind.drop                 fall of the induction logit difference, in percent; replaced by the mean over prompts
                           and positions
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechinterp.models.load import BUNDLED
from tools.train_bundled.exam import exam_prompts
from tools.train_bundled.templates import fill, task_file, word_lists


@dataclass(frozen=True)
class IoiBatch:
    """Prompts of one template: token ids with `<bos>` in front, their ABC versions, answers, positions."""

    clean: Tensor
    abc: Tensor
    right: Tensor
    wrong: Tensor
    positions: dict[str, Tensor]


def ioi_batches(task_name: str, per_template: int, words: dict[str, int], bos: int) -> list[IoiBatch]:
    """Return one batch for each test template."""
    task = task_file(task_name)
    result = []
    for template in task["splits"]["test"]["templates"]:
        single = {**task, "splits": {"test": {"templates": [template]}}}
        generator = random.Random(f"{template['text']}{template['order']}")
        prompts = [fill(single, "test", generator) for _ in range(per_template)]
        abc = []
        for prompt in prompts:
            names = [name for name in word_lists()["names"] if name not in prompt.words]
            fresh = iter(generator.sample(names, 8))
            abc.append([next(fresh) if word in (*prompt.right, *prompt.wrong) else word for word in prompt.words])
        s_places = [[i for i, w in enumerate(p.words, 1) if w == p.wrong[0]] for p in prompts]
        positions = {
            "IO": torch.tensor([p.words.index(p.right[0]) + 1 for p in prompts]),
            "S1": torch.tensor([places[0] for places in s_places]),
            "S1+1": torch.tensor([places[0] + 1 for places in s_places]),
            "S2": torch.tensor([places[-1] for places in s_places]),
            "end": torch.tensor([len(p.words) for p in prompts]),
        }
        result.append(
            IoiBatch(
                torch.tensor([[bos, *(words[w] for w in p.words)] for p in prompts]),
                torch.tensor([[bos, *(words[w] for w in row)] for row in abc]),
                torch.tensor([words[p.right[0]] for p in prompts]),
                torch.tensor([words[p.wrong[0]] for p in prompts]),
                positions,
            )
        )
    return result


@contextlib.contextmanager
def edited_z(model, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Edit the concatenated head outputs [batch, pos, d_model] in front of a layer's output projection."""
    projection = model.transformer.h[layer].attn.c_proj
    handle = projection.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def recorded_z(model, tokens: Tensor) -> list[Tensor]:
    """Return the concatenated head outputs [batch, pos, d_model] of each layer."""
    found: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for layer in range(model.config.n_layer):
            stack.enter_context(edited_z(model, layer, lambda z: (found.append(z), z)[1]))
        model(tokens)
    return found


def replace_head(head: int, d_head: int, mean: Tensor, places: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return an edit that puts `mean` [pos, d_model] into one head's slice, everywhere or at `places` [batch]."""
    start, stop = head * d_head, (head + 1) * d_head

    def edit(z: Tensor) -> Tensor:
        z = z.clone()
        if places is None:
            z[:, :, start:stop] = mean[: z.shape[1], start:stop]
        else:
            z[torch.arange(len(z)), places, start:stop] = mean[places, start:stop]
        return z

    return edit


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    rows = torch.arange(len(right))
    return logits[rows, -1, right] - logits[rows, -1, wrong]


def inspect_ioi(model, batches: list[IoiBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return the mean clean logit difference and one table [layer, head] for each column."""
    shape = (model.config.n_layer, model.config.n_head)
    d_head = model.config.n_embd // shape[1]
    looks = {"end>IO": ("end", "IO"), "end>S1": ("end", "S1"), "end>S2": ("end", "S2"), "S2>S1": ("S2", "S1"),
             "S2>S1+1": ("S2", "S1+1"), "S2>IO": ("S2", "IO")}  # fmt: skip
    cuts = {"drop": None, "@end": "end", "@S2": "S2", "@S1+1": "S1+1"}
    tables = {name: torch.zeros(shape) for name in (*looks, "end>rest", "direct", *cuts, "movers")}
    total = 0.0
    for batch in batches:
        rows = torch.arange(len(batch.clean))
        output = model(batch.clean, output_attentions=True, output_hidden_states=True)
        difference = logit_difference(output.logits, batch.right, batch.wrong).mean()
        total += difference.item() / len(batches)
        for name, (query, key) in looks.items():
            for layer in range(shape[0]):
                attention = output.attentions[layer][rows, :, batch.positions[query], batch.positions[key]]
                tables[name][layer] += attention.mean(0) / len(batches)
        after = torch.arange(batch.clean.shape[1]) > batch.positions["S2"][:, None]
        for layer in range(shape[0]):
            last = output.attentions[layer][rows, :, batch.positions["end"]]
            tables["end>rest"][layer] += (last * after[:, None]).sum(-1).mean(0) / len(batches)
        zs, means = recorded_z(model, batch.clean), [z.mean(0) for z in recorded_z(model, batch.abc)]
        direct = direct_effects(model, zs, output, batch)
        tables["direct"] += direct / len(batches)
        for layer in range(shape[0]):
            for head in range(shape[1]):
                for name, place in cuts.items():
                    places = None if place is None else batch.positions[place]
                    with edited_z(model, layer, replace_head(head, d_head, means[layer], places)):
                        cut = model(batch.clean, output_attentions=name == "drop")
                    fall = difference - logit_difference(cut.logits, batch.right, batch.wrong).mean()
                    tables[name][layer, head] += fall / len(batches)
                    if name == "drop":
                        tables["movers"][layer, head] += preference_fall(output, cut, direct, batch) / len(batches)
    for name in cuts:
        tables[name] *= 100 / total
    return total, tables


def direct_effects(model, zs: list[Tensor], output, batch: IoiBatch) -> Tensor:
    """Return [layer, head]: what each head's output at the last token adds to the logits of IO minus S."""
    n_heads = model.config.n_head
    d_head = model.config.n_embd // n_heads
    norm = model.transformer.ln_f
    grabbed: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: grabbed.append(args[0]))
    model(batch.clean)
    handle.remove()
    resid = grabbed[0][:, -1]
    scale = (resid.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    direction = (model.lm_head.weight[batch.right] - model.lm_head.weight[batch.wrong]) * norm.weight
    direction = (direction - direction.mean(-1, keepdim=True)) * scale
    result = torch.zeros(len(zs), n_heads)
    for layer, z in enumerate(zs):
        weight = model.transformer.h[layer].attn.c_proj.weight.view(n_heads, d_head, -1)
        written = torch.einsum("bhd,hdm->bhm", z[:, -1].view(len(z), n_heads, d_head), weight)
        result[layer] = torch.einsum("bhm,bm->bh", written, direction).mean(0)
    return result


def preference_fall(output, cut, direct: Tensor, batch: IoiBatch) -> float:
    """Return how much less the strongest name mover prefers IO to S1 after an ablation."""
    layer, head = divmod(int(direct.argmax()), direct.shape[1])
    rows, end = torch.arange(len(batch.clean)), batch.positions["end"]

    def preference(run) -> Tensor:
        attention = run.attentions[layer][rows, head, end]
        return (attention[rows, batch.positions["IO"]] - attention[rows, batch.positions["S1"]]).mean()

    return (preference(output) - preference(cut)).item()


def inspect_induction(model, words: dict[str, int], bos: int, count: int) -> tuple[float, dict[str, Tensor]]:
    """Return the mean clean logit difference and the tables prev, ind and ind.drop."""
    shape = (model.config.n_layer, model.config.n_head)
    d_head = model.config.n_embd // shape[1]
    tables = {name: torch.zeros(shape) for name in ("prev", "ind", "ind.drop")}
    prompts = exam_prompts("induction", count, seed=0)
    zs: list[list[Tensor]] = [[] for _ in range(shape[0])]
    runs = []
    for prompt in prompts:
        tokens = torch.tensor([[bos, *(words[w] for w in prompt.words)]])
        output = model(tokens, output_attentions=True)
        right, wrong = torch.tensor([words[prompt.right[0]]]), torch.tensor([words[prompt.wrong[0]]])
        runs.append((tokens, right, wrong))
        last = tokens.shape[1] - 1
        target = prompt.words.index(prompt.words[-1]) + 2
        for layer in range(shape[0]):
            attention = output.attentions[layer][0]
            tables["prev"][layer] += attention[:, range(2, last + 1), range(1, last)].mean(-1) / count
            tables["ind"][layer] += attention[:, last, target] / count
        for layer, z in enumerate(recorded_z(model, tokens)):
            zs[layer].append(z[0, 1:])
    total = torch.stack([logit_difference(model(t).logits, r, w) for t, r, w in runs]).mean()
    for layer in range(shape[0]):
        mean = torch.cat(zs[layer]).mean(0).expand(model.config.n_positions, -1)
        for head in range(shape[1]):
            with edited_z(model, layer, replace_head(head, d_head, mean, None)):
                cut = torch.stack([logit_difference(model(t).logits, r, w) for t, r, w in runs]).mean()
            tables["ind.drop"][layer, head] = 100 * (total - cut) / total
    return total.item(), tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=BUNDLED)
    parser.add_argument("--per-template", type=int, default=25)
    parser.add_argument("--task", default="ioi", choices=("ioi", "ioi_distractor"))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.directory, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.directory)
    words, bos = tokenizer.get_vocab(), tokenizer.bos_token_id
    with torch.inference_mode():
        ioi, tables = inspect_ioi(model, ioi_batches(arguments.task, arguments.per_template, words, bos))
        induction, more = inspect_induction(model, words, bos, 100)
    tables = {**tables, **more}
    print(f"{arguments.task}: mean logit difference {ioi:.2f}; induction: {induction:.2f}")
    print("head  " + " ".join(f"{name:>8}" for name in tables))
    for layer in range(model.config.n_layer):
        for head in range(model.config.n_head):
            cells = [f"{table[layer, head].item():8.2f}" for table in tables.values()]
            print(f"a{layer}.h{head} " + " ".join(cells))


if __name__ == "__main__":
    main()
