"""Train a tiny model that grows twice, and let it write: about a minute on a CPU.

    python examples/grow_a_tiny_model.py [text file]

Without a file it reads the source files of Python's standard library.
"""

import sys
from pathlib import Path

import megagrow

CONFIG = """
run: {dir: runs/tiny}
model:
  {family: llama, layers: 1, hidden: 64, heads: 4, ffn: 160, sequence: 64, tie_embeddings: false,
   init_std: {embedding: 0.5, head: 0.02, matrices: fan_in}}
data: {path: data/tiny}
optimizer: {lr: 6.0e-3}
schedule: {decay: 0.3}
batch: {global: 16, micro: 16}
stages:
  - until: {steps: 150}
  - grow: {operator: depth_stack, factor: 2}        # the layer and a copy of it
    until: {steps: 300}
  - grow: {operator: width_fresh, target: {hidden: 96, heads: 6, ffn: 256}}
    until: {steps: 450}
train: {validate_every: 50, log_every: 50, tensorboard: false}
"""


def main() -> None:
    """Prepare, train, write."""
    text = sys.argv[1] if len(sys.argv) > 1 else "stdlib"
    megagrow.prepare_dataset(text, "data/tiny", tokenizer="configs/tokenizers/bytes.json")
    Path("tiny.yaml").write_text(CONFIG, encoding="utf-8")
    megagrow.train_model(megagrow.load_config("tiny.yaml"))
    for written in megagrow.generate_text("runs/tiny", ["def ", "import "], temperature=0.7):
        print(f"\n{written.prompt}{written.text}")


if __name__ == "__main__":
    main()
