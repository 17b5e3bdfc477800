"""JSON Schemas without a download: our own, generated ones, and those of function signatures.

Three kinds, for three questions. :func:`own` are written by hand in the ten styles of
JSONSchemaBench (function calls, small and large configurations, events, resources, articles,
tools); :func:`generated` covers every common keyword, for correctness; :func:`calls` reads the
signatures of the Python standard library and asks for a call as JSON, for the quality of answers.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

TEXT, WHOLE, REAL, FLAG = ({"type": t} for t in ("string", "integer", "number", "boolean"))
SHORT: Schema = {"type": "string", "maxLength": 16}
NAME: Schema = {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,14}$"}


def record(*optional: str, **properties: Schema) -> Schema:
    """A closed object; all properties are required but those named first.

    Example:
        >>> record("b", a={}, b={})["required"]
        ['a']
    """
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def among(*values: Any) -> Schema:
    """One of the given values."""
    return {"enum": list(values)}


def several(items: Schema, least: int = 0, most: int = 4) -> Schema:
    """A list."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def within(low: float, high: float, kind: str = "integer") -> Schema:
    """A number of a range."""
    return {"type": kind, "minimum": low, "maximum": high}


def own() -> dict[str, list[Schema]]:
    """Schemas written by hand, by style."""
    date, moment = ({"type": "string", "format": f} for f in ("date", "date-time"))
    port, share = within(1, 65535), within(0, 1, "number")
    tree: Schema = {
        "$defs": {
            "node": record("children", name=SHORT, children=several({"$ref": "#/$defs/node"}))
        },
        "$ref": "#/$defs/node",
    }
    container = record(
        "ports", "env", name=NAME, image=NAME,
        ports=several(record(port=port, protocol=among("TCP", "UDP"))),
        env=several(record(name=NAME, value=SHORT), most=3),
    )  # fmt: skip
    metadata = record("labels", name=NAME, labels={"type": "object", "patternProperties": {
        "^[a-z]{1,8}$": SHORT}, "additionalProperties": False})  # fmt: skip
    event = {"event_id": {"type": "string", "format": "uuid"}, "at": moment}
    return {
        "function calls": [
            record(name={"const": "weather"}, arguments=record(city=SHORT, unit=among("C", "F"))),
            record(name={"const": "convert"}, arguments=record(sum=REAL, to=among("EUR", "USD"))),
            record(name={"const": "remind"}, arguments=record("note", at=moment, note=SHORT)),
            {"anyOf": [record(name={"const": n}, arguments=record(x=WHOLE)) for n in ("a", "b")]},
        ],
        "trivial": [record(), several(WHOLE), {"type": ["string", "null"]}, record(ok=FLAG)],
        "easy": [
            record(host=NAME, port=port, tls=FLAG),
            record("age", name=SHORT, age=within(0, 150)),
            record(tags=several(among("red", "green", "blue"), 1), score=share),
            record(at={"type": "array", "prefixItems": [REAL, REAL], "items": False}),
        ],
        "medium": [
            record(users=several(record(email={"type": "string", "format": "email"}), 1, 2)),
            record(
                "matrix", os=among("linux", "mac"), steps=several(record(run=SHORT), 1),
                matrix={"type": "object", "additionalProperties": several(SHORT, most=2)},
            ),
            record(range={"allOf": [within(0, 100), {"type": "integer", "multipleOf": 5}]}),
            record(value={"anyOf": [WHOLE, SHORT, {"type": "null"}]}, unit=among("s", "ms", None)),
        ],
        "hard": [
            tree,
            record(rules=several({"anyOf": [
                record(kind={"const": "allow"}, path=SHORT),
                record(kind={"const": "limit"}, path=SHORT, rate=within(1, 1000)),
            ]}, 1, 3)),
            {"type": "object", "properties": {"version": {"const": 2}}, "required": ["version"],
             "patternProperties": {"^x-": SHORT}, "additionalProperties": False},
            record(a=record(b=record(c=record(d=record(e=several(several(WHOLE, 1, 2), 1, 2)))))),
        ],
        "ultra": [
            record(**{f"field_{i}": (WHOLE, SHORT, FLAG, share)[i % 4] for i in range(24)}),
            record(*(f"f{i}" for i in range(1, 20)), **{f"f{i}": WHOLE for i in range(20)}),
            record(pages=several(record(title=SHORT, blocks=several({"anyOf": [
                record(text=SHORT), record(image=SHORT, width=within(1, 4096)),
                record(table=several(several(WHOLE, 1, 2), 1, 2)),
            ]}, 1, 2)), 1, 2)),
            record(codes=several({"enum": [f"E{i:03}" for i in range(120)]}, 1, 3)),
        ],
        "events": [
            record(**event, page=record(path=SHORT)),
            record(**event, buy=several(record(sku=NAME, price=within(0, 1e4, "number")), 1, 2)),
            record(**event, device=record(os=among("ios", "android"), ip={
                "type": "string", "format": "ipv4"})),
            record("user", **event, user={"type": ["integer", "null"]}),
        ],
        "resources": [
            record(kind={"const": "Pod"}, metadata=metadata, spec=record(
                containers=several(container, 1, 2))),
            record(kind={"const": "Service"}, metadata=metadata, spec=record(
                "type", ports=several(record(port=port), 1, 2), type=among("ClusterIP", "None"))),
            record(kind={"const": "Job"}, metadata=metadata, spec=record(backoff=within(0, 6))),
            record(kind={"const": "Scale"}, metadata=metadata, replicas=within(0, 100)),
        ],
        "articles": [
            record(headline=SHORT, published=date, words=within(1, 9999)),
            record(by=several(record("role", name=SHORT, role=SHORT), 1, 2), part=among("a", "b")),
            record(parts=several({"anyOf": [
                record(type={"const": "text"}, content=SHORT),
                record(type={"const": "quote"}, content=SHORT, source=SHORT),
            ]}, 1, 3)),
            record("embargo", id={"type": "string", "format": "uuid"}, embargo=moment),
        ],
        "tools": [
            record("exclude", line_length=within(40, 200), exclude=several(SHORT)),
            record("scripts", version={"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}$"},
                   scripts={"type": "object", "additionalProperties": SHORT}),
            record(rules={"type": "object", "additionalProperties": among("off", "warn", "error")}),
            record(strict=FLAG, target=among("es5", "es2022"), lib=several(NAME, most=2)),
        ],
    }  # fmt: skip


PATTERNS = (
    "^[A-Z]{2}[0-9]{2,4}$", "^(a|bc)+$", "^[^\"\\\\]{1,6}$", "[0-9]$", "^v\\d+(\\.\\d+){0,2}$",
    "^\\w{2,5}$", "^#[0-9a-fA-F]{6}$", "^(GET|POST) /[a-z]*$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")


def generated(count: int, seed: int = 0) -> list[Schema]:
    """Random schemas over the common keywords, each of which some value satisfies.

    Example:
        >>> len(generated(3)), generated(2) == generated(3)[:2]
        (3, True)
    """
    return [_Maker(random.Random(f"{seed}/{i}")).whole() for i in range(count)]


class _Maker:
    """Draws one schema."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.defs: dict[str, Schema] = {}

    def whole(self) -> Schema:
        schema = self.value(3)
        return {**schema, "$defs": self.defs} if self.defs else schema

    def value(self, depth: int) -> Schema:
        deep = [self.object, self.array, self.any_of, self.all_of, self.ref, self.recursive]
        flat = [self.integer, self.number, self.string, self.plain, self.constant]
        weights = [6, 4, 2, 1, 1, 1] if depth else [0] * 6
        make = self.source.choices([*deep, *flat], [*weights, *(2 if depth < 3 else 0.3,) * 5])[0]
        return make(depth)

    def integer(self, depth: int) -> Schema:
        low = self.source.randint(-300, 300)
        step = self.source.choice((1, 2, 5, 10))
        return {
            "type": "integer",
            **self.some(
                {"minimum": low, "maximum": low + 40 * step},
                {"exclusiveMinimum": low, "exclusiveMaximum": low + 40 * step},
                {"multipleOf": step},
                {"minimum": low, "maximum": low + 40 * step, "multipleOf": step},
                {},
            ),
        }

    def number(self, depth: int) -> Schema:
        low = round(self.source.uniform(-50, 50), self.source.randint(0, 2))
        return {
            "type": "number",
            **self.some({"minimum": low}, {"exclusiveMinimum": low, "maximum": low + 7.5}, {}),
        }

    def string(self, depth: int) -> Schema:
        least = self.source.randint(0, 3)
        return {
            "type": "string",
            **self.some(
                {"minLength": least, "maxLength": least + self.source.randint(0, 9)},
                {"maxLength": 8},
                {"pattern": self.source.choice(PATTERNS)},
                {"format": self.source.choice(FORMATS)},
            ),
        }

    def plain(self, depth: int) -> Schema:
        kind = self.source.choice(("boolean", "null"))
        return self.some({"type": kind}, {"type": [kind, "integer"], "minimum": 0, "maximum": 99})

    def constant(self, depth: int) -> Schema:
        values: list[Any] = ['a"b', "ü\n", 7, -1.5, None, True, ["x", 1], {"k": "v"}, "", "a\\"]
        few = self.source.sample(values, 3)
        return self.some({"const": few[0]}, {"enum": few})

    def object(self, depth: int) -> Schema:
        names = self.source.sample(["id", "name", "a b", "x-y", 'k"', "größe", "n1"], 3)
        names = names[: self.source.randint(1, 3)]
        out: Schema = {
            "type": "object",
            "properties": {name: self.value(depth - 1) for name in names},
            "required": [name for name in names if self.source.random() < 0.6],
        }
        rest = self.source.randrange(4)
        if rest == 1:
            out["additionalProperties"] = self.value(0)
        elif rest == 2:
            out["patternProperties"] = {"^p_[a-z]{1,3}$": self.value(0)}
        if rest in (0, 2):
            out["additionalProperties"] = False
        return out

    def array(self, depth: int) -> Schema:
        items = self.value(depth - 1)
        least = self.source.randint(0, 2)
        pair = [self.value(depth - 1), items]
        return {
            "type": "array",
            **self.some(
                {"items": items, "minItems": least, "maxItems": least + 2},
                {"items": items, "maxItems": 3},
                {"prefixItems": pair, "items": False, "minItems": 1},
                {"prefixItems": pair, "items": self.value(0), "maxItems": 4},
            ),
        }

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.value(depth - 1) for _ in range(2)]}

    def all_of(self, depth: int) -> Schema:
        open_ = {"type": "object", "properties": {"b": self.value(0)}, "required": ["b"]}
        first = {"type": "object", "properties": {"a": self.value(0)}, "required": ["a"]}
        whole = {"type": "integer", "minimum": 3}
        return self.some({"allOf": [first, open_]}, {"allOf": [whole, {"maximum": 70}]})

    def ref(self, depth: int) -> Schema:
        name = f"d{len(self.defs)}"
        self.defs[name] = {}
        self.defs[name] = self.value(depth - 1)
        return {"$ref": f"#/$defs/{name}"}

    def recursive(self, depth: int) -> Schema:
        name = f"r{len(self.defs)}"
        more: Schema = {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        self.defs[name] = record(v=self.value(0), next=more)
        return {"$ref": f"#/$defs/{name}"}

    def some(self, *options: Schema) -> Schema:
        return self.source.choice(options)
