"""A hash that binds a run's scores to its provenance.

It detects scores that were edited or mixed up after the run. It is not a signature and does not stop forgery.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"
PARTS = ("results", "n-samples", "configs", "versions")


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256 over the scores, their tasks and the provenance of a results file.

    Args:
        content: the file's JSON object, of JSON types only; an existing seal is left out of the hash.
    """
    provenance = {name: value for name, value in content["qvlm"].items() if name != SEAL}
    sealed = {name: content.get(name) for name in PARTS} | {"qvlm": provenance}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
