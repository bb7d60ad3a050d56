"""Where the sandbox's shipped models lie."""

from pathlib import Path

MODELS = Path(__file__).with_name("models")
GENERATOR = MODELS / "wan"
WORLD_MODEL = MODELS / "vjepa2"
