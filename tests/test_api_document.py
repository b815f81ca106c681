"""The OpenAPI document: it is there, tells what each field is, and leaves nothing unbounded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_fixtures import open_door

FRAMEWORKS_OWN = {"HTTPValidationError", "ValidationError"}


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    with open_door(tmp_path) as door:
        found: dict[str, Any] = door.get("/openapi.json").json()
    return found


def test_every_field_is_described(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        for field, told in schema.get("properties", {}).items():
            assert name in FRAMEWORKS_OWN or told.get("description"), f"{name}.{field}"
    for path, ways in document["paths"].items():
        for way in ways.values():
            assert way.get("summary"), path
            for parameter in way.get("parameters", ()):
                is_told = parameter.get("description") or parameter["schema"].get("description")
                assert is_told or path == "/v1/models/{model}", f"{path} {parameter['name']}"


def test_every_field_of_a_request_is_bounded(document: dict[str, Any]) -> None:
    bodies = [
        content["schema"]
        for ways in document["paths"].values()
        for way in ways.values()
        for content in way.get("requestBody", {}).get("content", {}).values()
    ]
    assert len(bodies) >= 4
    for body in bodies:
        for place, schema in leaves(body, document, "body"):
            assert is_bounded(schema), f"{place}: {schema}"


def leaves(schema: Any, document: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below one, references followed."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        yield from leaves(document["components"]["schemas"][name], document, name)
        return
    yield place, schema
    for field, inner in schema.get("properties", {}).items():
        yield from leaves(inner, document, f"{place}.{field}")
    for word in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(word, ()):
            yield from leaves(inner, document, place)
    if "items" in schema:
        yield from leaves(schema["items"], document, f"{place}[]")


def is_bounded(schema: dict[str, Any]) -> bool:
    if "enum" in schema or "const" in schema:
        return True
    match schema.get("type"):
        case "string":
            return "maxLength" in schema
        case "array":
            return "maxItems" in schema
        case "integer" | "number":
            has_floor = "minimum" in schema or "exclusiveMinimum" in schema
            return has_floor and ("maximum" in schema or "exclusiveMaximum" in schema)
    return True
