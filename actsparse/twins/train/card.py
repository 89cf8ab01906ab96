"""Writes CARD.md, the twins' model card, from log.json: no number in it is typed by hand."""

import json
from pathlib import Path
from string import Template

FOLDER = Path(__file__).parents[1]

CARD = Template("""# The twins: `twin-silu` and `twin-relu`

Two Llama-architecture language models of 6.95 M parameters that differ in `hidden_act` (silu, relu) and in
nothing else: same initial seed, same text in the same order, same optimiser and schedule, same tokenizer. The gate
stays in both, so they are SwiGLU and ReGLU. Made for studying activation sparsity and for tests that need a trained
model without a download. They are not assistants, and what they say is often wrong.

| | |
| --- | --- |
| architecture | `LlamaForCausalLM`, width 256, 704 neurons, 8 layers, 8 heads in 4 KV groups, tied embeddings |
| tokenizer | byte-level BPE, 4096 entries, digits one by one, opens every text with BOS |
| context | trained on rows of 1024 tokens, documents after one another, BOS before and EOS behind each |
| weights | bfloat16, 13.9 MB each |
| licence | Apache-2.0 |

## Text

No collected text. The twins learnt from what **SmolLM2-135M-Instruct** (Hugging Face, Apache-2.0; read from a Q4_1
GGUF) answered to a grid of prompts of our own: stories, fables, dialogue, descriptions, explanations, instructions,
lists, letters, opinions, reports. Sampled at temperature $temperature over tokens of at least $min_p of the top
token's chance. Kept were answers that ended by themselves, did not repeat a run of 10 tokens, were not too
compressible, and were distinct: $kept of $answers. Half of the documents open with their prompt and a line
break; the rest are the answer alone. One prompt in a hundred, with all its answers, was never trained on;
`heldout.jsonl` holds 128 of these documents.

$train_tokens training tokens in $train_documents documents and $held_out_tokens held-out tokens in
$held_out_documents (the twins' own tokenizer). $seen tokens were seen, about $epochs passes.

## Measured

Loss in nats a token. The first two columns: $rows rows of 1024 tokens of either side, at the end of training. The
others: the shipped bfloat16 weights, computed in float32, on the $measured_tokens tokens of `heldout.jsonl`.

| | train | held out | gap | shipped, held out |
| --- | --- | --- | --- | --- |
$losses

Held-out losses of the two differ by $difference %.

Share of exact zeros of `act(g) * u`, the input of `down_proj`:

| layer | $layers |
| --- | $rule |
$zeros

No sparsity loss, no threshold, no fine-tuning: these zeros are what ReLU gives by itself.

## How to prompt

As in training: a request, one line break, and the model answers; or the beginning of a text. `train/samples.md` shows
both. A request followed by an empty line is out of domain.

## Limits

- Simple English of the kinds above. Code, other languages, arithmetic and facts are out of domain.
- It inherits the weaknesses of a 4-bit 135 M model: repetition, wrong facts, stories that lose their thread.
- Positions beyond 1024 were never trained.
- Two small models of one seed say what changes when SiLU becomes ReLU at this size and on this text. They cannot
  say how it goes at a thousand times the size, nor how much of a small difference is chance.
- Losses are comparable between the twins, not with models of another tokenizer.
""")


def main() -> None:
    log = json.loads((FOLDER / "train" / "log.json").read_text())
    sample, training, measured = log["sample"], log["training"], log["measured"]
    final = training["final"]
    losses = {name: final[name]["held_out"] for name in measured}
    text = CARD.substitute(
        temperature=sample["settings"]["temperature"],
        min_p=sample["settings"]["min_p"],
        kept=f"{sample['yield']['kept']:,}",
        answers=f"{sample['yield']['answers']:,}",
        train_tokens=f"{training['train_tokens']:,}",
        train_documents=f"{training['train_documents']:,}",
        held_out_tokens=f"{training['held_out_tokens']:,}",
        held_out_documents=f"{training['held_out_documents']:,}",
        seen=f"{training['tokens_per_model']:,}",
        epochs=round(training["tokens_per_model"] / training["epoch_tokens"], 1),
        rows=training["final_rows"],
        measured_tokens=f"{measured['silu']['tokens']:,}",
        losses="\n".join(_losses(name, final[name], measured[name]["held_out_loss"]) for name in measured),
        difference=f"{100 * abs(losses['relu'] / losses['silu'] - 1):.2f}",
        layers=" | ".join(str(layer) for layer in range(8)),
        rule=" | ".join(["---"] * 8),
        zeros="\n".join(_shares(name, measured[name]["exact_zero_share"]) for name in measured),
    )
    (FOLDER / "CARD.md").write_text(text)


def _losses(name: str, final: dict[str, float], shipped: float) -> str:
    train, held_out = final["train"], final["held_out"]
    return f"| {name} | {train:.3f} | {held_out:.3f} | {held_out - train:.3f} | {shipped:.3f} |"


def _shares(name: str, shares: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |"


if __name__ == "__main__":
    main()
