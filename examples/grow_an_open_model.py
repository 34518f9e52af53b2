"""Grow a released model by new layers, train the new layers alone, and export the result.

    hf download HuggingFaceTB/SmolLM2-135M --local-dir models/SmolLM2-135M
    python examples/grow_an_open_model.py models/SmolLM2-135M corpus.txt --steps 200

The new layers are identities at first (LLaMA Pro, arXiv 2401.02415), so the loss starts where the
model left off. docs/grow-an-open-model.md does the same with configuration files and launchers.
"""

import argparse
from pathlib import Path

import megagrow

CONFIG = """
run: {{dir: runs/larger}}
init: {{from: {model}}}
model: {{sequence: {sequence}}}
data: {{path: data/open}}
optimizer: {{lr: 3.0e-4}}
batch: {{global: 8, micro: 2}}
stages:
  - grow: {{operator: depth_identity, target: {{layers: {layers}}}}}
    train: new
    until: {{steps: {steps}}}
"""


def main() -> None:
    """Prepare with the model's tokenizer, grow and train, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of a Hugging Face model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequence", type=int, default=512)
    given = parser.parse_args()
    megagrow.prepare_dataset(given.text, "data/open", tokenizer=f"{given.model}/tokenizer.json")
    source = megagrow.open_checkpoint(given.model)
    layers = max(place for tensor in source.catalog for place in tensor.places) - 1
    more = CONFIG.format(
        model=given.model, sequence=given.sequence, steps=given.steps, layers=layers + layers // 4
    )
    Path("larger.yaml").write_text(more, encoding="utf-8")
    megagrow.train_model(megagrow.load_config("larger.yaml"))
    megagrow.convert_checkpoint("runs/larger", "exports/larger", to_format="huggingface")
    print("exports/larger: AutoModelForCausalLM.from_pretrained reads it")


if __name__ == "__main__":
    main()
