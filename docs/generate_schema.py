"""Write the JSON Schema of --config files from the settings and their comments, or check that it is up to date.

python docs/generate_schema.py src/headstart/train.schema.json
python docs/generate_schema.py --check src/headstart/train.schema.json
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import TypeAdapter

from headstart.config import DURATION, FIELDS, HUGGING_FACE, LIMITS, SPOKEN, THAW, Tracker, TrainConfig, kinds

TRACKERS = "|".join(get_args(Tracker))
PATTERNS = {"thaw": THAW, "time_budget": DURATION, "report_to": f"none|({TRACKERS})(,({TRACKERS}))*"}
BOUNDS = LIMITS | {"thaw": {"minimum": 0}}


def meanings() -> dict[str, str]:
    """What each setting means: the comment on its line, or above it."""
    found, above = {}, list[str]()
    for line in inspect.getsource(TrainConfig).splitlines():
        code, _, comment = line.partition("# ")
        if name := re.match(r"    (\w+): ", code):
            found[name[1]] = " ".join([*above, comment] if comment else above)
        above = [*above, comment] if comment and not code.strip() else []
    return found


def schema_of(name: str, kind: Any) -> dict[str, Any]:
    """The schema of one of the types that a setting may have."""
    schema = TypeAdapter(kind).json_schema()
    if schema["type"] in ("integer", "number"):
        return {**schema, **BOUNDS.get(name, {})}
    return {**schema, "pattern": f"^({PATTERNS[name]})$"} if kind is str and name in PATTERNS else schema


def properties() -> dict[str, Any]:
    """Each setting, and Hugging Face's name of it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        types = [kind for kind in (SPOKEN.get(field.name), *kinds(field.name)) if kind not in (None, NoneType)]
        schemas = [schema_of(field.name, kind) for kind in types]
        if any(one["type"] == "array" for one in schemas):
            schemas.append(schema_of(field.name, str))  # several, with commas
        meaning = meanings()[field.name]
        if field.default is None:
            meaning = re.sub(r"\bNone\b", "left out", meaning)
        default = {} if field.default in (None, dataclasses.MISSING) else {"default": field.default}
        typed = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        found[field.name] = {"description": meaning, **typed, **default}
    return found | {other: {"$ref": f"#/properties/{name}"} for name, other in HUGGING_FACE.items()}


def document() -> str:
    """The whole schema."""
    assert set(HUGGING_FACE) <= set(FIELDS)
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",  # the newest that editors of TOML know well
        "title": "Settings of headstart train",
        "type": "object",
        "properties": properties(),
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or compare; 1 when the file is out of date."""
    *flags, path = sys.argv[1:]
    page = Path(path)
    if flags == ["--check"]:
        if page.read_text(encoding="utf-8") != document():
            sys.stderr.write(f"{page} is not what the settings are now: run `make fix`.\n")
            return 1
        return 0
    page.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
