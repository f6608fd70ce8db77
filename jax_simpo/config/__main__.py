"""Prints docs/config.md, the reference page of all keys: `python -m jax_simpo.config`; `--schema`: the JSON schema."""

from __future__ import annotations

import json
import sys

from jax_simpo.config import help, json_schema
from jax_simpo.config.schema import TrainConfig

if sys.argv[1:] == ["--schema"]:
    print(json.dumps(json_schema.schema(TrainConfig), indent=1, ensure_ascii=False))
elif sys.argv[1:]:
    sys.exit("usage: python -m jax_simpo.config [--schema]")
else:
    print(help.reference_page(TrainConfig), end="")
