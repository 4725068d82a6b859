"""The type of parsed JSON and YAML: what a file or a record holds before something has checked it."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""One JSON object. A value's type is known only after a check; where the keys are fixed, use a TypedDict or a dataclass."""
