"""Schemas of attributes: names with their choices, or JSON Schema; checked before any model is loaded."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors_pdlm import SettingError
from ..templates_pdlm import Choice, Template, text_of

MOST_ATTRIBUTES, MOST_CHOICES, MOST_TOGETHER = 64, 1000, 4000  # of a schema, an attribute, and a schema again
MOST_CHARACTERS = 200  # of a name or choice
MOST_TEMPLATES, TEMPLATE_CHARACTERS = 8, 4000
MOST_FILE_BYTES = 4_000_000
TEXT_TOKENS, MOST_TEXT_TOKENS = 8, 64  # of a free text
_FORMS = 'a list of choices, null (free text), {"max_tokens": N}, or JSON Schema with "enum", "boolean" or "maxLength"'
_NOTES = {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # Unicode's Cc, Zl, Zp and Cs
_TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}
_READ = {"type", "enum", "const", "maxLength", "minimum", "maximum", *_NOTES}  # of JSON Schema
_LIMITS: dict[Any, set[str]] = {"integer": {"minimum", "maximum"}, "string": {"maxLength"}}  # that a type can have


class Attribute(BaseModel):
    """One attribute: choices, or a free text if there are none.

    Args:
        choices (`list`): strings, integers or booleans.
        max_tokens (`int`): of a free text.
        max_length (`int`, *optional*): characters of a free text; what is longer is cut.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: list[Choice] | None = None
    max_tokens: int = Field(TEXT_TOKENS, ge=1, le=MOST_TEXT_TOKENS, strict=True)
    max_length: int | None = Field(None, ge=1, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """The fields, from any form that an attribute is given in."""
        if value is None:
            return {}
        if isinstance(value, (list, tuple)):
            return {"choices": list(value)}
        if not isinstance(value, dict):
            raise ValueError(f"expected {_FORMS}, got {value!r:.60}")
        if value.keys() <= {"choices", "max_tokens", "max_length"}:
            if "choices" in value and len(value) > 1:
                raise ValueError("`choices` and the length of a free text exclude each other")
            return value
        return _from_json_schema(value)

    @field_validator("choices", mode="before")
    @classmethod
    def _check_choices(cls, values: Any) -> Any:
        if not isinstance(values, list):
            raise ValueError(f"expected a list of choices, got {values!r:.60}")
        if not values:
            raise ValueError("the list of choices is empty")
        if len(values) > MOST_CHOICES:
            raise ValueError(f"{len(values)} choices, more than the {MOST_CHOICES} that an attribute may have")
        seen: dict[str, Any] = {}
        equal: set[Any] = set()
        for value in values:
            if not isinstance(value, (bool, int, str)):
                raise ValueError(f"a choice must be a string, an integer or a boolean, got {value!r:.60}")
            text = text_of(value)
            _check_text(text, f"the choice {value!r:.60}")
            shown = unicodedata.normalize("NFC", text)
            if shown in seen:
                raise ValueError(f"the choices {seen[shown]!r:.60} and {value!r:.60} are both written {text!r:.60}")
            if value in equal:  # True == 1
                raise ValueError(f"the choice {value!r:.60} equals another one; write one of them as a string")
            seen[shown] = value
            equal.add(value)
        return values

    def to_json(self) -> Any:
        """The attribute as a file or a request has it."""
        if self.choices is not None:
            return list(self.choices)
        return self.model_dump(exclude={"choices"}, exclude_none=True)

    @property
    def texts(self) -> list[str]:
        """The choices as they are written into a template; empty for a free text."""
        return [text_of(choice) for choice in self.choices or []]


class AttributeSchema(BaseModel):
    """Attributes to read of every region, and how.

    Args:
        attributes (`dict[str, Attribute]`): by name, in the order in which they are written.
        template (`list[str]`): sentences with a `{name}` place for every attribute, whose readings are averaged;
            none: the attributes in a list, "name: value".
        jointly (`bool`): read the most certain attribute of a region first, and the others given it.
        calibrate (`bool`): divide by what is read without a region.
        unknown_below (`float`, *optional*): a value whose probability is lower is unknown, None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attributes: dict[str, Attribute]
    template: list[str] = []
    jointly: bool = Field(False, strict=True)
    calibrate: bool = Field(False, strict=True)
    unknown_below: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """The fields, from a dict of attributes, a JSON Schema of an object, or a dict of the fields themselves."""
        if not isinstance(value, dict):
            raise ValueError(f"expected an object of attributes, got {value!r:.60}")
        if value.get("type") == "object" or isinstance(value.get("properties"), dict):
            known = {"type", "properties", "required", "additionalProperties", "$schema", "$id", *_NOTES}
            if unknown := [key for key in value if key not in known]:
                raise ValueError(f"JSON Schema's {unknown[0]!r:.60} is not read here, only properties")
            value = {"attributes": value.get("properties", {})}
        elif not (isinstance(value.get("attributes"), dict) and value.keys() <= cls.model_fields.keys()):
            own = value.get("attributes")
            if isinstance(own, dict) and not own.keys() <= _READ | Attribute.model_fields.keys():
                spare = next(key for key in value if key not in cls.model_fields)
                raise ValueError(f"{spare!r:.60} is no setting beside attributes, only {', '.join(cls.model_fields)}")
            if _is_template(value.get("template")):
                raise ValueError('a template stands beside the attributes: {"attributes": {...}, "template": "..."}')
            value = {"attributes": value}
        if isinstance(value.get("template"), str):
            value = value | {"template": [value["template"]]}
        return value

    @field_validator("attributes", mode="before")
    @classmethod
    def _check_names(cls, attributes: Any) -> Any:
        if not attributes:
            raise ValueError("there are no attributes")
        if not isinstance(attributes, dict):
            raise ValueError(f"expected an object of attributes, got {attributes!r:.60}")
        if len(attributes) > MOST_ATTRIBUTES:
            raise ValueError(f"{len(attributes)} attributes, more than the {MOST_ATTRIBUTES} that a schema may have")
        total = sum(map(_num_choices, attributes.values()))
        if total > MOST_TOGETHER and len(attributes) > 1:  # before anything looks at each of them
            raise ValueError(f"{total} choices together, more than the {MOST_TOGETHER} that a schema may have")
        for name in attributes:
            if not isinstance(name, str):
                raise ValueError(f"the name of an attribute must be a string, got {name!r:.60}")
            _check_text(name, f"the name {name!r:.60}")
            if "{" in name or "}" in name:
                raise ValueError(f"the name {name!r:.60} has a brace, which marks places in templates")
        return attributes

    @model_validator(mode="after")
    def _check_templates(self) -> "AttributeSchema":
        if len(self.template) > MOST_TEMPLATES:
            raise ValueError(f"{len(self.template)} templates, more than {MOST_TEMPLATES}")
        for text in self.template:
            if len(text) > TEMPLATE_CHARACTERS:
                raise ValueError(f"a template of {len(text)} characters; it may have {TEMPLATE_CHARACTERS}")
            Template(text).check_names(self.attributes)
        return self

    def to_json(self) -> dict[str, Any]:
        """The schema as a file or a request has it."""
        rest = self.model_dump(exclude={"attributes"}, exclude_defaults=True)
        return {"attributes": {name: attribute.to_json() for name, attribute in self.attributes.items()}, **rest}

    def to_text(self) -> str:
        """The schema to compare with that of another run: the order counts, and 1 is not true."""
        return json.dumps(self.to_json(), ensure_ascii=False)

    @property
    def choices(self) -> dict[str, list[str]]:
        """Texts of the choices of every attribute, empty for a free text, for the processor's `attribute_plan`."""
        return {name: attribute.texts for name, attribute in self.attributes.items()}

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of every free text, at most."""
        return {name: attribute.max_tokens for name, attribute in self.attributes.items() if not attribute.choices}


def _is_template(value: Any) -> bool:
    """Whether what may be an attribute of this name is a sentence, or several, with places."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(text, str) and re.search(r"\{[^{}]+\}", text) for text in texts)


def _num_choices(value: Any) -> int:
    """Choices of an attribute in any form, as far as they can be counted without a look at them."""
    if isinstance(value, Attribute):
        value = value.choices
    elif isinstance(value, dict) and isinstance(value.get("choices", value.get("enum")), (list, tuple)):
        value = value.get("choices", value.get("enum"))
    elif isinstance(value, dict) and value.get("type") == "integer":
        least, most = value.get("minimum"), value.get("maximum")
        return max(0, min(most - least + 1, MOST_CHOICES)) if type(least) is type(most) is int else 0
    return len(value) if isinstance(value, (list, tuple)) else 0


def _check_text(text: str, what: str) -> None:
    """Raises: ValueError for a text that cannot stand in a template."""
    if reason := fault_of_text(text):
        raise ValueError(f"{what} {reason}")


def fault_of_text(text: str) -> str | None:
    """Why a name or a value cannot stand in a template, as the end of a sentence; None if it can."""
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        return "is empty"
    if len(text) > MOST_CHARACTERS:
        return f"has {len(text)} characters, more than {MOST_CHARACTERS}"
    if _BREAKS.search(text):
        return "has a line break, a control character or half of a character"
    return None


def _from_json_schema(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of an attribute from its JSON Schema. Raises: ValueError."""
    if unknown := [key for key in value if key not in _READ]:
        raise ValueError(f"{unknown[0]!r:.60} is not read here; expected {_FORMS}")
    kind = value.get("type")
    if kind is not None and (not isinstance(kind, str) or kind not in _TYPES):
        raise ValueError(f"the type {kind!r:.60} cannot be read; expected one of {', '.join(_TYPES)}")
    listed = [key for key in ("const", "enum") if key in value]
    limits = set() if listed else _LIMITS.get(kind, set())
    spare = [key for key in value if key not in {"type", *listed, *_NOTES, *limits}]
    if spare and (listed or kind):
        raise ValueError(f"{spare[0]!r} is not read beside {listed[0] if listed else f'the type {kind}'}")
    if listed:
        choices = [value["const"]] if "const" in value else value["enum"]
        if len(listed) > 1 and not (isinstance(value["enum"], list) and value["const"] in value["enum"]):
            raise ValueError(f"the const {value['const']!r:.60} is none of the enum")
        if kind is not None and isinstance(choices, list):
            for choice in choices:
                if type(choice) is not _TYPES[kind]:
                    raise ValueError(f"the choice {choice!r:.60} is not of the type {kind}")
        return {"choices": choices}
    if kind == "boolean":
        return {"choices": [True, False]}
    if kind == "integer":
        return {"choices": _integers(value)}
    if kind == "string" and "maxLength" in value:
        length = value["maxLength"]
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"maxLength must be a positive integer, got {length!r:.60}")
        return {"max_tokens": min(length, MOST_TEXT_TOKENS), "max_length": length}
    if kind == "string":
        return {}
    raise ValueError(f"expected {_FORMS}, got {value!r:.60}")


def _integers(value: dict[str, Any]) -> list[int]:
    least, most = value.get("minimum"), value.get("maximum")
    if type(least) is not int or type(most) is not int:
        raise ValueError("an integer needs integers as minimum and maximum, or a list of choices")
    if not 0 <= most - least < MOST_CHOICES:
        raise ValueError(f"the integers from {least!r:.30} to {most!r:.30} are none, or more than {MOST_CHOICES}")
    return list(range(least, most + 1))


def parse_schema(value: Any, **settings: Any) -> AttributeSchema:
    """Check a schema.

    Args:
        value: an [`AttributeSchema`]; a dict of attributes, for example `{"colour": ["red", "dark blue"], "damaged":
            [True, False], "name": None}`; a JSON Schema of an object; or a dict of the fields of the class.
        **settings: other fields of the schema, which replace its own where they are not None.

    Raises:
        SettingError: it cannot be used; the message names the attribute.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(settings.get("template"), str):
        settings["template"] = [settings["template"]]
    try:
        schema = value if isinstance(value, AttributeSchema) else AttributeSchema.model_validate(value)
        if settings:
            fields = {name: getattr(schema, name) for name in AttributeSchema.model_fields}
            schema = AttributeSchema.model_validate(fields | settings)
        return schema
    except ValidationError as error:
        raise SettingError(_first(error)) from None
    except RecursionError:
        raise SettingError("The schema is nested too deeply.") from None


def _first(error: ValidationError) -> str:
    """The first of the errors that pydantic found, in a line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = [part for part in first["loc"] if isinstance(part, str)]
    reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
    if where[:1] == ["attributes"] and len(where) > 1:
        return f"The schema's attribute {where[1]!r:.60}: {reason}."
    return f"The schema: {f'{where[0]:.60}: ' if where else ''}{reason}."


def parse_schema_text(text: str) -> AttributeSchema:
    """Check a schema that a person typed: an attribute a line, `colour: red, dark blue`, without choices for a free
    text, `name:`; or the content of a schema file.

    Raises:
        SettingError: it cannot be used; the message names the line or the attribute.
    """
    if len(text) > MOST_FILE_BYTES:
        raise SettingError(f"The schema is longer than {MOST_FILE_BYTES} characters.")
    if text.lstrip().startswith("{"):
        return _parse_json(text)
    attributes: dict[str, list[str] | None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, colon, choices = (part.strip() for part in line.partition(":"))
        if not line.strip():
            continue
        if not colon or not name:
            raise SettingError(
                f"Line {number}: expected a name and its choices, like `colour: red, blue`, got {line!r:.60}."
            )
        if name in attributes:
            raise SettingError(f"Line {number}: there is an attribute {name!r:.60} already.")
        attributes[name] = [choice.strip() for choice in choices.split(",")] if choices else None
    return parse_schema({"attributes": attributes})


def _parse_json(text: str) -> AttributeSchema:
    """Check a schema in JSON. Raises: SettingError."""
    try:
        return parse_schema(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse))
    except RecursionError:
        raise SettingError("The schema is nested too deeply.") from None
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"The schema is not valid JSON ({error}).") from None


def read_schema_file(path: Path) -> AttributeSchema:
    """Read and check a JSON file with a schema.

    Raises:
        SettingError: the file is no JSON, names an attribute twice, is too large, or its schema cannot be used.
        OSError: the file cannot be read.
    """
    if path.stat().st_size > MOST_FILE_BYTES:
        raise SettingError(f"{path}: larger than {MOST_FILE_BYTES} bytes; this cannot be a schema of attributes.")
    try:
        return _parse_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingError(f"{path}: The schema is not valid JSON ({error}).") from None
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingError(f"The name {twice!r:.60} stands twice in one object.")
    return out


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
