"""The type of parsed JSON and YAML before it is validated."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""One JSON object, or one record or manifest. Where the keys are fixed, use a TypedDict or a dataclass."""
