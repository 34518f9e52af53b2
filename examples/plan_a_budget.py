"""When to grow, for a model and a budget, under three published scaling laws: no training.

python examples/plan_a_budget.py [configuration] [tokens]
"""

import sys

from megagrow.cli.main import main as megagrow


def main() -> None:
    """Ask the planner once for each law."""
    config = sys.argv[1] if len(sys.argv) > 1 else "configs/paper/large.yaml"
    tokens = sys.argv[2] if len(sys.argv) > 2 else "3e10"
    for law in ("kaplan", "chinchilla", "epoch"):
        print(f"--- {law}")
        status = megagrow(["plan", "--config", config, "--tokens", tokens, "--law", law])
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
