"""Where the repository's files lie, for tests that read or run them."""

import importlib.metadata
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"

# A Megatron pretraining script that knows nothing of this package, for the megatron-core that is installed.
_BEFORE_019 = importlib.metadata.version("megatron-core").startswith("0.18.")
PRETRAIN_GPT = str(TESTS / "scripts" / f"cpu_pretrain_gpt{'_018' if _BEFORE_019 else ''}.py")
